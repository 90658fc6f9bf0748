"""Placements put every virtual token where the original code puts the prompt."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.virtual_tokens import (
    Suffix,
    Template,
    after_bos,
    as_placement,
    prefix,
    suffix,
)
from prompt_tuning_jax.typing import Injection
from tests.conftest import MINI_CONFIG, assert_close, mini_params

V = 100


def without_padding(row):
  """The tokens up to the last one that is not padding (a shifted row starts with 0)."""
  used = np.flatnonzero(row)
  return row[: used[-1] + 1] if len(used) else row[:0]


@pytest.mark.parametrize(
    ('recorded', 'placement', 'tokens'),
    [
        ('prefix', prefix, 'tokens'),
        ('after_bos', after_bos, 'tokens'),
        ('suffix_decoder_only=False_before_eos=False', suffix, 'tokens'),
        ('suffix_decoder_only=False_before_eos=True', Suffix(before_eos=True), 'tokens'),
        ('suffix_decoder_only=True_before_eos=False', suffix, 'tokens_shifted'),
        (
            'suffix_decoder_only=True_before_eos=True',
            Suffix(before_eos=True),
            'tokens_shifted',
        ),
    ],
)
def test_the_prompt_stands_where_the_original_puts_it(golden, recorded, placement, tokens):
  values = np.load(golden / 't5x' / 'combine_fns.npz')
  width = values[recorded].shape[1]
  for row, ids in enumerate(values[tokens]):
    placed = placement(without_padding(ids), 2, V)
    words = iter(values['x_embed'][row])
    embedded = [
        values['prompt'][row, i - V] if i >= V else next(words)
        for i in np.pad(placed, (0, width - len(placed)))
    ]
    np.testing.assert_array_equal(embedded, values[recorded][row])


@pytest.fixture(scope='module')
def mini():
  """The recorded model, compiled once for the cases of one shape."""
  return jax.jit(T5(MINI_CONFIG).apply)


@pytest.mark.parametrize(
    ('case', 'placement'),
    [
        ('variant_mini_suffix_P5', 'suffix_before_eos'),
        ('variant_mini_after_bos_P5', 'after_bos'),
    ],
)
def test_batches_give_the_recorded_logits(golden, mini, case, placement):
  values = np.load(golden / 't5x' / f'{case}.npz')
  inputs = values['batch/encoder_input_tokens']
  targets = values['batch/decoder_target_tokens']
  batch = make_batch(
      [
          {'inputs': without_padding(i), 'targets': without_padding(t)}
          for i, t in zip(inputs, targets, strict=True)
      ],
      input_length=inputs.shape[1],
      target_length=targets.shape[1],
      vocab_size=MINI_CONFIG.vocab_size,
      num_virtual_tokens=5,
      placement=placement,
  )
  for name in ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights'):
    np.testing.assert_array_equal(getattr(batch, name), values[f'batch/{name}'])
  logits = mini({'params': mini_params(golden)}, batch, Injection(values['prompt']))
  assert_close(logits, values['logits'], name=case)


@pytest.mark.parametrize('placement', ['prefix', 'after_bos', 'suffix', 'suffix_before_eos'])
@pytest.mark.parametrize('length', [None, 0, 1, 3, 9])
def test_every_virtual_token_occurs_once_and_the_words_keep_their_order(placement, length):
  placed = as_placement(placement)([7, 5, 3, 8, 1], 4, V, length=length)
  assert placed.dtype == np.int32
  np.testing.assert_array_equal(placed[placed >= V], [V, V + 1, V + 2, V + 3])
  np.testing.assert_array_equal(placed[placed < V], [7, 5, 3, 8, 1][:length])


def test_a_template_mixes_slots_fields_and_words(vocabulary):
  words = vocabulary.encode('It is')
  template = Template((1, 'inputs', 'text: It is', 2, 'subject')).bind(vocabulary)
  placed = template([7, 5, 1], 3, 5000, fields={'subject': [9, 9]})
  np.testing.assert_array_equal(placed, [5000, 7, 5, 1, *words, 5001, 5002, 9, 9])


def test_a_template_cuts_fields_from_the_end_and_never_its_words(vocabulary):
  words = vocabulary.encode('It is')
  template = Template(('inputs', 'text: It is', 2, 'subject')).bind(vocabulary)
  length = len(words) + 4
  placed = template([7, 5, 1], 2, 5000, length=length, fields={'subject': [9, 8, 6]})
  np.testing.assert_array_equal(placed, [7, 5, 1, *words, 5000, 5001, 9])
  assert len(placed) == length + 2


def test_a_template_of_one_slot_in_front_is_the_prefix():
  tokens = [7, 5, 3, 8, 1]
  np.testing.assert_array_equal(
      Template((4, 'inputs'))(tokens, 4, V, length=3), prefix(tokens, 4, V, length=3)
  )


def test_a_template_must_use_exactly_the_prompt():
  with pytest.raises(ValueError, match='places for 6 virtual tokens.*has 5.*PROMPT_LENGTH=6'):
    Template((3, 'inputs', 3))([7, 1], 5, V)


def test_an_unknown_field_is_named_with_the_nearest_known_one():
  with pytest.raises(ValueError, match="'subjet'.*Did you mean 'subject'"):
    Template((1, 'inputs', 'subjet'))([7], 1, V, fields={'subject': [9]})


def test_words_without_a_vocabulary_are_an_error():
  with pytest.raises(ValueError, match=r'template\.bind\(backbone\.vocabulary\)'):
    Template((1, 'text: It is', 'inputs'))([7], 1, V)


def test_words_that_leave_no_room_for_the_example_are_an_error(vocabulary):
  template = Template((1, 'text: It is a long introduction', 'inputs')).bind(vocabulary)
  with pytest.raises(ValueError, match='leaves nothing of an input length of 2'):
    template([7], 1, V, length=2)


@pytest.mark.parametrize(
    ('items', 'message'),
    [
        ((3, 4), 'names no field'),
        ((0, 'inputs'), 'at least one virtual token'),
        ((1.5, 'inputs'), 'neither a number'),
    ],
)
def test_templates_that_make_no_sense_are_refused(items, message):
  with pytest.raises(ValueError, match=message):
    Template(items)


@pytest.mark.parametrize(
    'placement', [prefix, after_bos, suffix, Suffix(before_eos=True), Template((1, 'inputs', 2))]
)
def test_a_placement_is_made_again_from_its_description(placement):
  assert as_placement(placement.description) == placement


def test_an_unknown_placement_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match="No placement 'prefx'.*Did you mean 'prefix'"):
    as_placement('prefx')
