"""The layers of T5: norm, relative position bias, attention, gated MLP.

Names of submodules and parameters are T5X's, so that its checkpoints load as
they are; kernels are two-dimensional [in, out] with T5X's logical axes. Norms
and softmax compute in float32 whatever the computation's dtype. Shapes follow
the key in `prompt_tuning_jax/typing.py`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from prompt_tuning_jax.partitioning import constrain_rows
from prompt_tuning_jax.typing import Array, KeysValues

# What T5X adds to the attention logits of a hidden position. In float32 it swallows
# the logits of a row in which everything is hidden, so that such a row attends evenly.
MASKED = -1e10


def dropout(x: Array, rate: float, rng: Array | None, shared_axis: int = -2) -> Array:
  """T5's dropout: one mask for all positions of a row (`shared_axis`).

  Does nothing where `rng` is None or `rate` is 0.
  """
  if rng is None or rate == 0.0:
    return x
  shape = list(x.shape)
  shape[shared_axis] = 1
  keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


# As with any product, the backward pass multiplies in the type of the factors. JAX's own
# rule would multiply the float32 gradient of the logits with a float32 copy of the kernel,
# many times slower on a GPU.
@jax.custom_vjp
def float32_product(x: Array, kernel: Array) -> Array:
  """`x @ kernel`, summed and kept in float32 although both may be bfloat16."""
  return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _float32_product_forward(x, kernel):
  return float32_product(x, kernel), (x, kernel)


def _float32_product_backward(factors, gradient):
  _, pullback = jax.vjp(jnp.matmul, *factors)
  return pullback(gradient.astype(factors[0].dtype))


float32_product.defvjp(_float32_product_forward, _float32_product_backward)


class Kernel(nn.Module):
  """A matrix [in, out] without bias, `Dense` in T5's terms; it may be in int8 (`int8.py`).

  Attributes:
    features: size of the output.
    axes: logical names of the two axes.
    stddev: of the initialisation.
    dtype: type of the computation.
    float32_output: whether products are kept in float32 whatever `dtype` is.
  """

  features: int
  axes: tuple[str, str]
  stddev: float
  dtype: jnp.dtype
  float32_output: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes),
        (x.shape[-1], self.features),
    )
    product = float32_product if self.float32_output else jnp.matmul
    scale = self.get_variable('params', 'kernel_scale')
    if scale is not None:
      return _int8_product(product, x, kernel, scale)
    return product(x, kernel.astype(self.dtype))


# Without the checkpoint, the converted kernels of all layers would be kept for the backward
# pass: the very copy of the model that int8 is to spare.
@functools.partial(jax.checkpoint, static_argnums=0)
def _int8_product(product, x: Array, kernel: Array, scale: Array) -> Array:
  y = product(x, kernel.astype(x.dtype))
  return (y * scale).astype(y.dtype)


class RMSNorm(nn.Module):
  """Root mean square norm with a scale and no bias (Zhang & Sennrich, 2019)."""

  dtype: jnp.dtype
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
        'scale',
        nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
        (x.shape[-1],),
    )
    return _rms_norm(x, scale, self.epsilon).astype(self.dtype)


# Elementwise work is cheaper to repeat in the backward pass than to keep: without the
# checkpoints here the residuals of a step take about twice the memory.
@functools.partial(jax.checkpoint, static_argnums=2)
def _rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def place_virtual(x_BSD: Array, rows_PD: Array, index_BS: Array) -> Array:
  """`x_BSD` with row `index` of a prompt wherever the index is not negative."""
  with jax.named_scope('virtual_tokens'):
    is_virtual_BS = index_BS >= 0
    length = len(rows_PD)
    # Ordinary tokens ask for a row that is not there: their gradients, which are zero, are
    # dropped instead of being added to a row by all of them. Converted behind the choice, so
    # that the gradients of a row add up in float32.
    rows_BS = jnp.where(is_virtual_BS, jnp.minimum(index_BS, length - 1), length)
    rows_BSD = jnp.asarray(rows_PD).at[rows_BS].get(mode='fill', fill_value=0)
    return jnp.where(is_virtual_BS[..., None], rows_BSD.astype(x_BSD.dtype), x_BSD)


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
  """Bucket of a distance key − query (Raffel et al., 2020, section 2.1).

  Small distances have a bucket each, larger ones share logarithmically growing
  buckets, everything from `max_distance` on shares the last. Bidirectional
  attention spends half of the buckets on keys that come later.

  Computed here and not on the device, as T5X does it: at some distances the logarithm is a
  whole number, and a device's, which may be a little less, would move them to another bucket.

  Args:
    relative_position: int32 array of key position − query position.
    bidirectional: True in the encoder, False in the decoder.
    num_buckets: rows of the bias table.
    max_distance: distance from which all share a bucket.

  Returns:
    int32 array of the same shape, in [0, num_buckets).
  """
  relative_position = np.asarray(relative_position, np.int32)
  offset = np.zeros_like(relative_position)
  if bidirectional:
    num_buckets //= 2
    offset = np.where(relative_position > 0, np.int32(num_buckets), np.int32(0))
    distance = np.abs(relative_position)
  else:
    distance = np.maximum(-relative_position, 0)
  num_exact = num_buckets // 2
  # The epsilon is T5X's own: it keeps log(0) away where the exact buckets win anyway.
  log_ratio = np.log(
      distance.astype(np.float32) / np.float32(num_exact) + np.finfo(np.float32).eps
  ) / np.log(np.float32(max_distance / num_exact))
  logarithmic = num_exact + (log_ratio * np.float32(num_buckets - num_exact)).astype(np.int32)
  logarithmic = np.minimum(logarithmic, num_buckets - 1)
  return offset + np.where(distance < num_exact, distance, logarithmic)


class RelativePositionBias(nn.Module):
  """A learned number for each head and distance bucket, added to attention logits."""

  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self,
      query_positions_T: Array,
      key_positions_S: Array,
      has_position_S: Array | None = None,
  ) -> Array:
    """Returns the bias [1, N, T, S]; keys that have no position get none."""
    table_NR = self.param(
        'rel_embedding',
        nn.with_logical_partitioning(
            nn.initializers.normal(self.num_heads**-0.5), ('heads', 'relpos_buckets')
        ),
        (self.num_heads, self.num_buckets),
    )
    # All distances from max_distance on have the same: a table of those up to it says all.
    farthest = self.max_distance
    buckets = relative_position_bucket(
        np.arange(-farthest, farthest + 1),
        bidirectional=self.bidirectional,
        num_buckets=self.num_buckets,
        max_distance=farthest,
    )
    by_distance = jnp.asarray(table_NR, self.dtype)[:, buckets]
    distance_TS = key_positions_S[None, :] - query_positions_T[:, None]
    bias_1NTS = by_distance[None, :, jnp.clip(distance_TS, -farthest, farthest) + farthest]
    return bias_1NTS if has_position_S is None else bias_1NTS * has_position_S


# jax.nn.softmax is compiled apart, so that its result is kept twice for the backward
# pass: once as a residual, once as what is multiplied with the values.
@jax.custom_jvp
def _softmax(x: Array) -> Array:
  """Softmax over the last axis whose only residual is its result."""
  x = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)))
  return x / jnp.sum(x, axis=-1, keepdims=True)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  y = _softmax(x)
  return y, y * (tangent - jnp.sum(y * tangent, axis=-1, keepdims=True))


def prepend(
    prefix: KeysValues | None, own: KeysValues, prompt_ids_B: Array | None = None
) -> KeysValues:
  """Keys and values [B, P + S, N, H]: a prefix's [P, N, H] before a layer's own.

  Of several prefixes, [K, P, N, H], each row gets the one that its id names.
  """
  if prefix is None:
    return own

  def one(prefix: Array, own_BSNH: Array) -> Array:
    if prompt_ids_B is None:
      shape = (own_BSNH.shape[0], *prefix.shape)
      prefix_BPNH = jnp.broadcast_to(jnp.asarray(prefix), shape)
    else:
      prefix_BPNH = constrain_rows(jnp.asarray(prefix).at[prompt_ids_B].get(mode='clip'))
    # Converted behind the choice, so that the gradients of a prefix add up in float32.
    prefix_BPNH = prefix_BPNH.astype(own_BSNH.dtype)
    return jnp.concatenate([prefix_BPNH, own_BSNH], axis=1)

  return tuple(map(one, prefix, own))


def prefix_length(prefix: KeysValues | None) -> int:
  """Positions of a prefix [L, P, N, H], or of each of several."""
  return 0 if prefix is None else prefix[0].shape[-3]


# How queries, keys and values become outputs: by the products written out here, or by
# `jax.nn.dot_product_attention`, compiled by XLA or one kernel of cuDNN's.
ATTENTIONS = ('xla', 'dot_product', 'cudnn')


def check_cudnn(dtype: jnp.dtype, platform: str | None = None) -> None:
  """Raises ValueError unless cuDNN's attention can be computed in a type on a platform.

  Args:
    dtype: of the computation.
    platform: of the devices, as JAX calls it; the default's where None.
  """
  platform = platform or jax.default_backend()
  if platform != 'gpu' or dtype != jnp.bfloat16:
    raise ValueError(
        "ATTENTION='cudnn' computes in bfloat16 on NVIDIA GPUs, but this run computes in "
        f"{jnp.dtype(dtype).name} on {platform}. Set ATTENTION='xla'"
        + (", or DTYPE='bfloat16'." if platform == 'gpu' else '.')
    )


class Attention(nn.Module):
  """Multi-head attention as in T5: no biases, no 1/sqrt(H) on the logits.

  Attributes:
    implementation: one of `ATTENTIONS`.
  """

  num_heads: int
  d_kv: int
  d_model: int
  dtype: jnp.dtype
  dropout_rate: float = 0.0
  implementation: str = 'xla'

  def setup(self) -> None:
    joined = self.num_heads * self.d_kv
    into = dict(features=joined, axes=('embed', 'joined_kv'), dtype=self.dtype)
    # T5 folds the 1/sqrt(d_kv) that its logits lack into the query's initialisation.
    self.query = Kernel(stddev=(self.d_model * self.d_kv) ** -0.5, **into)
    self.key = Kernel(stddev=self.d_model**-0.5, **into)
    self.value = Kernel(stddev=self.d_model**-0.5, **into)
    self.out = Kernel(
        features=self.d_model,
        axes=('joined_kv', 'embed'),
        stddev=joined**-0.5,
        dtype=self.dtype,
    )

  def _split_heads(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.num_heads, self.d_kv)

  def keys_and_values(self, x_BSD: Array) -> KeysValues:
    """Keys and values [B, S, N, H] of the positions that can be attended to.

    Whoever asks for the collection `keys_values` gets them too (`T5.keys_and_values`).
    """
    own = tuple(
        checkpoint_name(self._split_heads(kernel(x_BSD)), 'qkv')
        for kernel in (self.key, self.value)
    )
    self.sow('keys_values', 'own', own, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return own

  def __call__(
      self,
      x_BTD: Array,
      key_BSNH: Array,
      value_BSNH: Array,
      bias_BNTS: Array,
      dropout_rng: Array | None = None,
      *,
      decoding: bool = False,
  ) -> Array:
    """Attends from `x_BTD`; hidden pairs carry a large negative bias.

    Args:
      x_BTD: what attends.
      key_BSNH, value_BSNH: what it attends to.
      bias_BNTS: added to the logits.
      dropout_rng: of the weights' dropout; None leaves it out.
      decoding: whether these are single tokens, of one sequence or several side by side.
    """
    query_BTNH = checkpoint_name(self._split_heads(self.query(x_BTD)), 'qkv')
    with jax.named_scope('attention'):
      if self.implementation == 'xla':
        mixed_BTNH = self._mixed(query_BTNH, key_BSNH, value_BSNH, bias_BNTS, dropout_rng)
      else:
        mixed_BTNH = self._fused(query_BTNH, key_BSNH, value_BSNH, bias_BNTS, decoding)
    return self.out(mixed_BTNH.reshape(*x_BTD.shape[:-1], -1))

  def _mixed(self, query_BTNH, key_BSNH, value_BSNH, bias_BNTS, dropout_rng) -> Array:
    # With the heads in front both products are plain ones of matrices for each head, which
    # CPUs compute up to twice as fast as those of the heads between the other axes.
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    query_BNTH, key_BNSH, value_BNSH = map(heads_first, (query_BTNH, key_BSNH, value_BSNH))
    logits_BNTS = jnp.einsum('BNTH,BNSH->BNTS', query_BNTH, key_BNSH)
    logits_BNTS = logits_BNTS.astype(jnp.float32) + bias_BNTS.astype(jnp.float32)
    weights_BNTS = _softmax(logits_BNTS).astype(self.dtype)
    weights_BNTS = dropout(weights_BNTS, self.dropout_rate, dropout_rng)
    return heads_first(jnp.einsum('BNTS,BNSH->BNTH', weights_BNTS, value_BNSH))

  def _fused(self, query_BTNH, key_BSNH, value_BSNH, bias_BNTS, decoding) -> Array:
    # cuDNN's kernel is for many queries.
    many = query_BTNH.shape[1] > 1 and not decoding
    cudnn = self.implementation == 'cudnn' and many
    shape = (*bias_BNTS.shape[:2], query_BTNH.shape[1], key_BSNH.shape[1])
    try:
      return jax.nn.dot_product_attention(
          query_BTNH,
          key_BSNH,
          value_BSNH,
          bias=jnp.broadcast_to(bias_BNTS, shape).astype(self.dtype if cudnn else jnp.float32),
          scale=1.0,
          implementation='cudnn' if cudnn else 'xla',
      )
    except NotImplementedError as error:
      raise ValueError(
          f"ATTENTION='cudnn' cannot attend from {query_BTNH.shape[1]} positions to "
          f'{key_BSNH.shape[1]} with heads of width {self.d_kv}: {error} In training it takes '
          'even lengths, the prompt included (PROMPT_LENGTH, TASK_FEATURE_LENGTHS, '
          'PACKED_LENGTH), and heads whose width is a multiple of 8. Change these, or set '
          "ATTENTION='xla'."
      ) from error


_ACTIVATIONS = {
    'relu': jax.nn.relu,
    # T5 1.1 uses the tanh approximation, Hugging Face's `gelu_new`.
    'gelu': lambda x: jax.nn.gelu(x, approximate=True),
    'linear': lambda x: x,
}


@functools.partial(jax.checkpoint, static_argnums=0)
def _gate(activations: tuple[str, ...], branches: list[Array]) -> Array:
  """The product of the activated branches; one branch is an ordinary activation."""
  activated = [_ACTIVATIONS[name](x) for name, x in zip(activations, branches)]
  return functools.reduce(jnp.multiply, activated)


class MLP(nn.Module):
  """Feed-forward block: ReLU (T5 1.0) or gated (Shazeer, 2020; T5 1.1)."""

  d_ff: int
  activations: tuple[str, ...]
  dtype: jnp.dtype
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x_BTD: Array, dropout_rng: Array | None = None) -> Array:
    d_model = x_BTD.shape[-1]
    gated = len(self.activations) > 1
    branches = [
        Kernel(
            self.d_ff,
            ('embed', 'mlp'),
            d_model**-0.5,
            self.dtype,
            name=f'wi_{i}' if gated else 'wi',
        )(x_BTD)
        for i in range(len(self.activations))
    ]
    branches = [checkpoint_name(x, 'mlp') for x in branches]
    hidden_BTF = _gate(self.activations, branches)
    hidden_BTF = dropout(hidden_BTF, self.dropout_rate, dropout_rng)
    return Kernel(d_model, ('mlp', 'embed'), self.d_ff**-0.5, self.dtype, name='wo')(
        hidden_BTF
    )
