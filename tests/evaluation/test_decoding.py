"""Decoding against T5X's recorded beams, and the laws of any decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.evaluation import beam_search, decoding, ranking, sampling
from prompt_tuning_jax.evaluation.decoder import CachedDecoder
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.typing import Batch, Injection
from tests.conftest import prepend_virtual, recorded_batch
from tests.evaluation.conftest import HistoryModel, history_sequences

EOS = 1
ONE_ROW = np.ones((1, 1), np.int32)
EMPTY = np.zeros((1, 1), np.int32)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def run(name, module, params, inputs, injection=None, **kwargs):
  """A decoder's result as numpy arrays."""
  if name == 'sample':
    kwargs.setdefault('keys_B', keys(len(inputs)))
  decoder = getattr(decoding, name)
  return jax.device_get(decoder(module, params, inputs, injection, **kwargs))


def cut(tokens):
  """A sequence up to its end-of-sequence token, as a tuple."""
  tokens = [int(token) for token in tokens]
  return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


@pytest.fixture(scope='module')
def recorded(golden):
  return np.load(golden / 't5x' / 'decode_mini32_P20.npz')


@pytest.fixture(scope='module')
def inputs(recorded):
  """The recorded inputs with the prompt of 20 in front, and the prompt."""
  batch = prepend_virtual(recorded_batch(recorded), vocab_size=32, length=20)
  return batch.encoder_input_tokens, Injection(jnp.asarray(recorded['prompt']))


@pytest.mark.parametrize(
    'name, num_beams, alpha',
    [('greedy_beam1', 1, 0.6), ('beam4', 4, 0.6), ('beam4_alpha0', 4, 0.0)],
)
def test_beams_are_those_that_t5x_found(mini32, recorded, inputs, name, num_beams, alpha):
  module, params = mini32
  tokens, scores = run(
      'beam_search', module, params, *inputs, max_length=12, num_beams=num_beams, alpha=alpha
  )
  np.testing.assert_array_equal(tokens, recorded[f'{name}/tokens'])
  np.testing.assert_allclose(scores, recorded[f'{name}/scores'], rtol=1e-5)


def test_beams_share_what_they_read_of_the_encoder(mini32, inputs):
  module, params = mini32
  decoder = CachedDecoder(module, params, *inputs)
  cache = jax.eval_shape(lambda: decoder.init_cache(12, 4))
  rows = len(inputs[0])
  assert cache.self_keys.shape[1] == cache.self_values.shape[1] == 4 * rows
  assert cache.cross_keys.shape[1] == cache.cross_values.shape[1] == rows


def test_the_last_beam_is_the_one_that_t5x_returns_as_best(mini32, recorded, inputs):
  module, params = mini32
  tokens, scores = run('beam_search', module, params, *inputs, max_length=12)
  np.testing.assert_array_equal(tokens[:, -1], recorded['beam4_top/tokens'])
  np.testing.assert_allclose(scores[:, -1], recorded['beam4_top/scores'], rtol=1e-5)


def test_greedy_decoding_is_t5x_sampling_at_temperature_zero(mini32, recorded, inputs):
  """T5X reports scores of 0 there; ours are the log-probabilities, checked below."""
  module, params = mini32
  tokens, _ = run('greedy', module, params, *inputs, max_length=12)
  np.testing.assert_array_equal(tokens, recorded['temp0/tokens'])
  cold, _ = run(
      'sample', module, params, *inputs, max_length=12, temperature=0.0
  )
  np.testing.assert_array_equal(cold, tokens)


@pytest.fixture(scope='module')
def no_pads(mini32):
  """The recorded model, changed so that a pad is never the likeliest token.

  The random model likes to decode pads in mid-sequence. Decoding sees them as tokens,
  as in T5X; teacher forcing hides them, so that the two could not be compared.
  """
  module, params = mini32
  kernel = params['decoder']['logits_dense']['kernel'].copy()
  kernel[:, 0] = kernel[:, 1:].mean(axis=1)
  decoder = {**params['decoder'], 'logits_dense': {'kernel': kernel}}
  return module, {**params, 'decoder': decoder}


def test_cached_decoding_is_the_argmax_of_repeated_full_forwards(no_pads, inputs):
  module, params = no_pads
  tokens, scores = run('greedy', module, params, *inputs, max_length=12)
  forward = jax.jit(module.apply)
  so_far = np.zeros((6, 13), np.int32)
  done = np.zeros(6, bool)
  expected_scores = np.zeros(6)
  for step in range(12):
    # Targets only say which positions are real: all of them.
    batch = Batch(inputs[0], so_far[:, :12], np.ones((6, 12), np.int32), None)
    logits_BV = forward({'params': params}, batch, inputs[1])[:, step]
    so_far[:, step + 1] = np.where(done, 0, np.argmax(logits_BV, axis=-1))
    expected_scores += np.where(done, 0, np.max(jax.nn.log_softmax(logits_BV), axis=-1))
    done |= so_far[:, step + 1] == EOS
  np.testing.assert_array_equal(tokens[:, 0], so_far[:, 1:])
  np.testing.assert_allclose(scores[:, 0], expected_scores, rtol=1e-5)
  assert len(np.unique(tokens)) > 8


DECODERS = {
    'greedy': {},
    'sample': dict(num_samples=4),
    'beam_search': dict(num_beams=4, alpha=0.0),
}


@pytest.mark.parametrize('name', DECODERS)
def test_decoded_scores_are_the_scores_of_teacher_forcing(no_pads, inputs, name):
  module, params = no_pads
  tokens, scores = run(
      name, module, params, *inputs, max_length=12, **DECODERS[name]
  )
  compared = 0
  for k in range(tokens.shape[1]):
    targets = np.asarray(tokens[:, k])
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    batch = Batch(inputs[0], shifted, targets, (targets > 0).astype(np.int32))
    forced = ranking.score_targets(module, params, batch, inputs[1])
    for row in range(len(targets)):
      if scores[row, k] > decoding.UNFILLED and 0 not in cut(targets[row]):
        assert forced[row] == pytest.approx(float(scores[row, k]), rel=1e-4)
        compared += 1
  assert compared >= {'greedy': 6, 'sample': 12, 'beam_search': 12}[name]


@pytest.mark.parametrize('name', DECODERS)
def test_a_row_is_decoded_alike_whatever_the_rows_beside_it(no_pads, inputs, name):
  module, params = no_pads
  tokens, injection = inputs
  order = np.array([3, 1, 5, 0, 2, 4])
  changed = tokens[order].copy()
  changed[[0, 5]] = 0

  def decode(rows, **kwargs):
    kwargs = {**DECODERS[name], **kwargs}
    return run(name, module, params, rows, injection, max_length=12, **kwargs)

  before = decode(tokens)
  after = decode(changed, **({'keys_B': keys(6)[order]} if name == 'sample' else {}))
  for was, now in zip(before, after):
    np.testing.assert_allclose(now[1:5], was[order[1:5]], rtol=1e-5)


def test_a_beam_for_every_sequence_finds_the_best_of_all():
  model, length = HistoryModel(), 5
  sequences = history_sequences(model, length)
  finished = {s: score for s, score in sequences.items() if s[-1] == EOS}
  assert len(finished) == sum(3**n for n in range(length))
  for alpha in (0.0, 0.6, 2.0):
    tokens, scores = run(
        'beam_search', model, {}, ONE_ROW, max_length=length, num_beams=81, alpha=alpha
    )
    expected = sorted(
        (score / ((5 + len(s)) / 6) ** alpha, s) for s, score in finished.items()
    )[-20:]
    assert [cut(t) for t in tokens[0, -20:]] == [s for _, s in expected]
    np.testing.assert_allclose(scores[0, -20:], [score for score, _ in expected], rtol=1e-5)


def test_a_narrow_beam_reports_true_scores_of_the_sequences_it_finds():
  """Would fail if beams kept the cache of another beam: histories decide the logits."""
  sequences = history_sequences(HistoryModel(), 6)
  tokens, scores = run(
      'beam_search', HistoryModel(), {}, ONE_ROW, max_length=6, num_beams=3, alpha=0.0
  )
  for sequence, score in zip(tokens[0], scores[0]):
    assert float(score) == pytest.approx(sequences[cut(sequence)], rel=1e-5)


def test_one_beam_may_finish_where_greedy_goes_on():
  """T5X's default decoder also finishes with an end token that is second best."""
  model = HistoryModel(eos_bias=-2.0)
  greedy_tokens, greedy_scores = run('greedy', model, {}, ONE_ROW, max_length=6)
  tokens, scores = run(
      'beam_search', model, {}, ONE_ROW, max_length=6, num_beams=1, alpha=0.0
  )
  assert cut(tokens[0, 0]) != cut(greedy_tokens[0, 0])
  assert scores[0, 0] > greedy_scores[0, 0]


def test_without_a_finished_beam_the_live_ones_are_returned():
  model = HistoryModel(vocab_size=8, eos_bias=-50.0)
  tokens, scores = run('beam_search', model, {}, ONE_ROW, max_length=3, num_beams=2)
  sequences = history_sequences(model, 3)
  assert not (tokens == EOS).any()
  for sequence, score in zip(tokens[0], scores[0]):
    assert float(score) == pytest.approx(sequences[tuple(map(int, sequence))], rel=1e-5)


@pytest.mark.parametrize('decoder', ['greedy', 'sample', 'beam_search'])
def test_decoding_stops_as_soon_as_every_row_is_done(decoder):
  model = HistoryModel(eos_bias=50.0, count_steps=True)
  kwargs = {'beam_search': dict(num_beams=1)}
  rows = np.concatenate([ONE_ROW, ONE_ROW, EMPTY])
  model.calls.clear()
  tokens, _ = run(
      decoder, model, {}, rows, max_length=40, **kwargs.get(decoder, {})
  )
  jax.effects_barrier()
  assert [cut(t) for t in tokens[:2, 0]] == [(EOS,), (EOS,)]
  assert len(model.calls) == 1


FIRST_TOKENS = dict(max_length=1, num_samples=4000)


def first_token_shares(**kwargs):
  tokens, _ = run('sample', HistoryModel(), {}, ONE_ROW, **FIRST_TOKENS, **kwargs)
  return np.bincount(np.asarray(tokens[0, :, 0]), minlength=4) / 4000


def test_samples_follow_the_distribution_at_each_temperature():
  logits = 2.0 * np.sin(2.0 * np.arange(4))
  for temperature in (0.5, 1.0, 2.0):
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = first_token_shares(temperature=temperature)
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize('count', [1, 2, 3, 4])
def test_top_k_and_top_p_leave_out_all_but_the_likeliest(count):
  probs = np.array([[0.1, 0.4, 0.2, 0.3]])
  kept = probs >= np.sort(probs)[:, -count]
  for top_p in (probs[kept].sum() - 0.05, probs[kept].sum() - 1e-3):
    allowed = sampling._cut_off(jnp.log(probs), 0, top_p)
    np.testing.assert_array_equal(jnp.isfinite(allowed), kept)
  allowed = sampling._cut_off(jnp.log(probs), count, None)
  np.testing.assert_array_equal(jnp.isfinite(allowed), kept)
  np.testing.assert_allclose(allowed[kept], np.log(probs[kept]), rtol=1e-6)
  # A top_k beyond the vocabulary keeps everything.
  assert jnp.isfinite(sampling._cut_off(jnp.log(probs), 9, None)).all()


def test_samples_of_top_k_and_top_p_keep_their_proportions():
  probs = np.exp(2.0 * np.sin(2.0 * np.arange(4)))
  probs /= probs.sum()
  order = np.argsort(-probs)
  kept = np.where(probs >= probs[order[1]], probs, 0) / probs[order[:2]].sum()
  np.testing.assert_allclose(first_token_shares(top_k=2), kept, atol=0.03)
  top_p = probs[order[0]] + 0.01
  np.testing.assert_allclose(first_token_shares(top_p=top_p), kept, atol=0.03)


def test_samples_are_ordered_by_their_score_and_repeat_with_their_key():
  arguments = dict(max_length=5, num_samples=8)
  tokens, scores = run(
      'sample', HistoryModel(), {}, ONE_ROW, **arguments
  )
  again, _ = run('sample', HistoryModel(), {}, ONE_ROW, **arguments)
  other, _ = run(
      'sample', HistoryModel(), {}, ONE_ROW, keys_B=keys(1, seed=1), **arguments
  )
  np.testing.assert_array_equal(tokens, again)
  assert not np.array_equal(tokens, other)
  assert (np.diff(scores[0]) >= 0).all()
  assert len({cut(t) for t in tokens[0]}) > 1


def test_other_values_of_the_same_shape_are_not_compiled_again():
  def decode(alpha, temperature, top_p):
    model = HistoryModel()
    run('beam_search', model, {}, ONE_ROW, max_length=6, num_beams=3, alpha=alpha)
    cut_off = dict(temperature=temperature, top_p=top_p)
    run('sample', model, {}, ONE_ROW, **FIRST_TOKENS, **cut_off)

  decode(0.6, 1.0, 0.9)
  compiled = sampling._sample._cache_size(), beam_search._beam_search._cache_size()
  decode(0.3, 0.7, 0.5)
  assert (sampling._sample._cache_size(), beam_search._beam_search._cache_size()) == compiled


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(max_length=0), 'max_length=0 must be at least 1'),
        (dict(num_samples=0), 'num_samples=0 must be at least 1'),
        (dict(temperature=-1.0), 'temperature=-1.0'),
        (dict(top_k=-1), 'top_k=-1'),
        (dict(keys_B=None), 'needs keys_B'),
        (dict(top_p=0.0), r'top_p=0.0 must lie in \(0, 1\]'),
    ],
)
def test_parameters_out_of_range_are_refused(arguments, message):
  arguments = {'max_length': 3, **arguments}
  with pytest.raises(ValueError, match=message):
    run('sample', HistoryModel(), {}, ONE_ROW, **arguments)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(strategy='beam', num_beams=0), 'num_beams=0 must be at least 1'),
        (dict(strategy='beam', alpha=-0.1), 'alpha=-0.1 must not be negative'),
        (dict(strategy='sample', top_p=2.0), 'top_p=2.0 must lie in'),
        (dict(max_length=0), 'max_length=0 must be at least 1'),
    ],
)
def test_settings_are_checked_before_anything_is_decoded(settings, message):
  with pytest.raises(ValueError, match=message):
    Decoding(**settings)


def test_a_setting_that_a_strategy_does_not_read_is_said():
  with pytest.warns(UserWarning, match="'greedy', which does not read num_beams=5.*='beam'"):
    Decoding(num_beams=5)
  with pytest.warns(UserWarning, match="does not read top_k=3. Set strategy='sample'"):
    Decoding(strategy='beam', num_beams=5, top_k=3)
  assert Decoding(max_length=None).max_length is None


def test_no_beams_are_refused():
  with pytest.raises(ValueError, match='num_beams=0 must be at least 1'):
    run('beam_search', HistoryModel(), {}, ONE_ROW, max_length=3, num_beams=0)
