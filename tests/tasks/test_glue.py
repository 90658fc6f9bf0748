"""GLUE reads as T5 writes it, character by character and id by id."""

import pytest

from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.tasks.recorded import assert_recorded_examples


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))


@pytest.fixture
def t5_vocabulary(shared_data):
  return Vocabulary(shared_data / 't5' / 'spiece.model')


def test_sst2_text_and_ids_equal_the_recorded_ones(
    golden, t5_vocabulary, tmp_path, monkeypatch
):
  assert_recorded_examples(
      golden, t5_vocabulary, tmp_path, monkeypatch,
      'glue_sst2_v200', 'sst2/validation.jsonl', 'sst2',
  )  # fmt: skip


def test_the_validation_file_of_sst2_is_read(shared_data, t5_vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  task = load_task('taskless_glue_sst2_v200', 'validation', t5_vocabulary)
  assert len(task) == 872
  assert task.example(0)['inputs_pretokenized'] == (
      "sentence: it 's a charming and often affecting journey ."
  )
  assert task.label_classes[task.target(0)] == 'positive'
  (metric,) = task.metric_fns
  targets = [task.target(index) for index in range(len(task))]
  # The majority class of the official validation set is positive, 444 of 872.
  assert metric(targets, [1] * 872) == {'accuracy': pytest.approx(100 * 444 / 872)}
