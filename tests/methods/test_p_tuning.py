"""P-tuning's encoders: PEFT's recorded one, PyTorch's LSTM, and the same by its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.typing import BackboneSpec
from tests.checkpoints.samples import recorded_batch
from tests.checkpoints.test_hf import mean_loss, stacked
from tests.conftest import assert_close, prepend_virtual

SPEC = BackboneSpec(64, 16, 3, 4, 2, 3)
LENGTH = 5
# The published encoders and the most general: nothing in it is as wide as something else.
ENCODERS = {
    'LAMA': {},
    'SuperGLUE': {'lstm_width': 1.0},
    'MLP': {'lstm_layers': 0},
    'PEFT MLP': {'lstm_layers': 0, 'mlp_widths': (12, 12)},
    'PEFT LSTM': {'lstm_width': 12, 'mlp_widths': (24,)},
    'any': {'lstm_layers': 3, 'lstm_width': 5, 'mlp_widths': (7, 9)},
}
GATES = 'ifgo'  # In the order in which PyTorch stacks them.


def from_torch(state, lstm_layers, biases=np.add):
  """Parameters of PTuning in the names and shapes of PyTorch's; `biases` makes one of two."""
  params = {'embedding': state['embedding.weight']}
  for layer in range(lstm_layers):
    for way, suffix in (('forward', ''), ('backward', '_reverse')):
      kinds = ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh')
      arrays = [state[f'lstm_head.{kind}_l{layer}{suffix}'] for kind in kinds]
      ih, hh, *both = ([*np.split(array, 4)] for array in arrays)
      cell = params[f'lstm_{layer}_{way}'] = {}
      for number, gate in enumerate(GATES):
        cell[f'i{gate}'] = {'kernel': ih[number].T}
        bias = biases(both[0][number], both[1][number])
        cell[f'h{gate}'] = {'kernel': hh[number].T, 'bias': bias}
  linears = [name.removesuffix('.weight') for name in state if name.startswith('mlp_head')]
  linears = sorted({name for name in linears if not name.endswith('.bias')})
  for number, name in enumerate(linears):
    ours = 'output' if number == len(linears) - 1 else f'mlp_{number}'
    params[ours] = {'kernel': state[f'{name}.weight'].T, 'bias': state[f'{name}.bias']}
  return params


def assert_close_trees(actual, expected, relative):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for path, leaf in jax.tree.leaves_with_path(expected):
    found = actual
    for key in path:
      found = found[key.key]
    assert_close(found, leaf, relative, jax.tree_util.keystr(path))


def test_peft_s_recorded_encoder_gives_its_logits_loss_and_gradients(golden):
  recorded = load_file(golden / 'hf' / 'peft_t5' / 't5v11.ptuning5_mlp' / 'io.safetensors')
  module, backbone_params = stacked(golden / 'hf' / 't5v11' / 'hf')
  batch = recorded_batch(recorded)

  def of(prefix):
    names = (name for name in recorded if name.startswith(prefix))
    return from_torch({name.removeprefix(prefix): recorded[name] for name in names}, 0)

  # PEFT encodes a second prompt for the decoder, which nothing reads.
  method = PTuning(10, lstm_layers=0, mlp_widths=(48, 48))
  batch_with_prompt = prepend_virtual(batch, module.config.vocab_size, 5)

  @jax.jit
  @lambda f: jax.value_and_grad(f, has_aux=True)
  def run(params):
    injection = method.apply({'params': params}, module.spec)
    injection = injection.replace(virtual_embeddings=injection.virtual_embeddings[:5])
    logits = module.apply({'params': backbone_params}, batch_with_prompt, injection)
    return mean_loss(logits, batch), (logits, injection.virtual_embeddings)

  (loss, (logits, prompt_PD)), gradient = run(of('param.'))
  predicted = recorded['labels'] >= 0
  assert_close(logits[predicted], recorded['logits'][predicted], 1e-5, 'logits')
  assert_close(loss[None], recorded['loss'], 1e-5, 'loss')
  assert_close_trees(gradient, of('grad.'), 2e-5)
  exported = load_file(
      golden / 'hf' / 'peft_t5' / 't5v11.ptuning5_mlp' / 'adapter_model.safetensors'
  )
  assert_close(prompt_PD, exported['prompt_embeddings'][:5], 1e-6, 'prompt')


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ENCODERS)
def test_pytorch_computes_the_same_prompt_and_gradients(encoder):
  torch = pytest.importorskip('torch', reason='needs the extra `hf`')
  settings = ENCODERS[encoder]
  method = PTuning(LENGTH, **settings)
  width = SPEC.d_model

  def units(width):
    return int(width * SPEC.d_model) if isinstance(width, float) else width

  theirs = torch.nn.ModuleDict({'embedding': torch.nn.Embedding(LENGTH, width)})
  if method.lstm_layers:
    theirs['lstm_head'] = torch.nn.LSTM(
        width, units(method.lstm_width), method.lstm_layers, bidirectional=True
    )
    width = 2 * units(method.lstm_width)
  linears = []
  for of_layer in method.mlp_widths:
    linears += [torch.nn.Linear(width, units(of_layer)), torch.nn.ReLU()]
    width = units(of_layer)
  theirs['mlp_head'] = torch.nn.Sequential(*linears, torch.nn.Linear(width, SPEC.d_model))

  x = theirs['embedding'](torch.arange(LENGTH))
  if method.lstm_layers:
    x = theirs['lstm_head'](x)[0]
  prompt = theirs['mlp_head'](x)
  weights = np.random.default_rng(0).normal(size=prompt.shape).astype(np.float32)
  (prompt * torch.tensor(weights)).sum().backward()

  state = {name: leaf.detach().numpy() for name, leaf in theirs.named_parameters()}
  gradients = {name: leaf.grad.numpy() for name, leaf in theirs.named_parameters()}
  params = from_torch(state, method.lstm_layers)

  def total(params):
    prompt_PD = method.apply({'params': params}, SPEC).virtual_embeddings
    return (prompt_PD * weights).sum(), prompt_PD

  gradient, prompt_PD = jax.jit(jax.grad(total, has_aux=True))(params)
  assert_close(prompt_PD, prompt.detach().numpy(), 1e-5, 'prompt')
  # Both of PyTorch's biases have the gradient of our one.
  of_bias = from_torch(gradients, method.lstm_layers, biases=lambda one, other: one)
  assert_close_trees(gradient, of_bias, 1e-5)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def lstm_by_its_equations(cell, x_PE):
  """Hochreiter & Schmidhuber (1997) with forget gates, position by position."""
  hidden = memory = np.zeros(cell['hi']['bias'].shape)
  outputs = []
  for x in x_PE:
    i, f, g, o = (
        x @ cell[f'i{gate}']['kernel']
        + hidden @ cell[f'h{gate}']['kernel']
        + cell[f'h{gate}']['bias']
        for gate in GATES
    )
    memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * np.tanh(memory)
    outputs.append(hidden)
  return np.stack(outputs)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_the_prompt_is_what_the_equations_say(encoder):
  method = PTuning(LENGTH, **ENCODERS[encoder])
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
      jax.eval_shape(lambda: method.init(jax.random.key(0), SPEC)['params']),
  )
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = exact['embedding']
  for layer in range(method.lstm_layers):
    there = lstm_by_its_equations(exact[f'lstm_{layer}_forward'], x)
    back = lstm_by_its_equations(exact[f'lstm_{layer}_backward'], x[::-1])[::-1]
    x = np.concatenate([there, back], axis=1)
  for layer in range(len(method.mlp_widths)):
    linear = exact[f'mlp_{layer}']
    x = np.maximum(x @ linear['kernel'] + linear['bias'], 0)
  expected = x @ exact['output']['kernel'] + exact['output']['bias']
  injection = jax.jit(lambda params: method.apply({'params': params}, SPEC))(params)
  injection.check(SPEC)
  assert_close(injection.virtual_embeddings, expected, 1e-5)


def test_every_weight_starts_as_in_pytorch():
  spec = BackboneSpec(64, 128, 3, 4, 2, 3)
  params = PTuning(100, lstm_layers=1).init(jax.random.key(0), spec)['params']
  bound = 64**-0.5  # The LSTM has 64 units a direction.

  def assert_uniform(leaf, bound):
    assert np.abs(leaf).max() <= bound
    assert abs(np.std(leaf) * np.sqrt(3) / bound - 1) < 5 * np.sqrt(0.2 / leaf.size)

  for way in ('forward', 'backward'):
    cell = params[f'lstm_0_{way}']
    for gate in GATES:
      assert_uniform(cell[f'i{gate}']['kernel'], bound)
      assert_uniform(cell[f'h{gate}']['kernel'], bound)
    # The sum of two biases: wider than one, and small values are more likely.
    biases = np.concatenate([cell[f'h{gate}']['bias'] for gate in GATES])
    assert bound < np.abs(biases).max() <= 2 * bound
    assert abs(np.std(biases) / (bound * np.sqrt(2 / 3)) - 1) < 0.2
  for name in ('mlp_0', 'output'):
    assert_uniform(params[name]['kernel'], 128**-0.5)
    assert_uniform(params[name]['bias'], 128**-0.5)
  table = params['embedding']
  assert abs(np.std(table) - 1) < 5 * np.sqrt(0.5 / table.size)
  leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.shape == (64, 64)]
  assert len({leaf.tobytes() for leaf in map(np.asarray, leaves)}) == len(leaves)


def test_the_table_may_start_from_other_numbers():
  def count(key, shape, dtype=jnp.float32):
    return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

  method = PTuning(3, lstm_layers=0, embedding_init=count)
  params = method.init(jax.random.key(0), SPEC)['params']
  np.testing.assert_array_equal(params['embedding'], np.arange(48).reshape(3, 16))


@pytest.mark.parametrize('length', [0, -1, None, 20.0, '20'])
def test_what_is_no_length_is_refused_by_the_name_of_its_macro(length):
  with pytest.raises(ValueError, match=r'PROMPT_LENGTH is .*\(PTuning.length\).*at least 1'):
    PTuning(length)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'lstm_layers': -1}, 'PTuning.lstm_layers is -1; it may be 2 as published'),
        ({'lstm_layers': 2.0}, 'PTuning.lstm_layers is 2.0'),
        ({'lstm_width': 0.55}, r'lstm_width: 0.55 .* d_model=16 is 8.8, .* such as 9'),
        ({'lstm_width': 1}, 'lstm_width: 1 is no width. .* 1.0 is d_model'),
        ({'lstm_width': -0.5}, 'lstm_width: -0.5 is no width'),
        ({'lstm_width': '8'}, "lstm_width: '8' is no width"),
        ({'lstm_width': float('nan')}, 'lstm_width: nan is no width'),
        ({'mlp_widths': 16}, r'PTuning.mlp_widths is 16; .* Set \(1.0,\)'),
        ({'mlp_widths': (16, True)}, 'mlp_widths: True is no width'),
    ],
)
def test_encoders_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    PTuning(3, **settings).init(jax.random.key(0), SPEC)


def test_half_of_an_odd_width_is_no_number_of_units():
  spec = BackboneSpec(64, 17, 3, 4, 2, 3)
  with pytest.raises(ValueError, match=r'0.5 × d_model=17 is 8.5, .* such as 8'):
    PTuning(3).init(jax.random.key(0), spec)
  method = PTuning(3, lstm_width=9)
  injection, _ = jax.eval_shape(lambda: method.init_with_output(jax.random.key(0), spec))
  injection.check(spec)
