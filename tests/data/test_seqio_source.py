"""Any seqio task can be tokenised with any model's vocabulary, once."""

import functools
import sys
import textwrap

import numpy as np
import pytest

from prompt_tuning_jax.data import cache, seqio_source
from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.vocabulary import Vocabulary

MODULE = textwrap.dedent("""
    import functools
    import seqio
    import tensorflow as tf
    from prompt_tuning_jax.evaluation import metrics, postprocessors

    VOCABULARY = seqio.SentencePieceVocabulary('/nowhere/spiece.model', 100)
    TEXTS = ['a small animal', 'the sweet fruit of a tree', 'part of <extra_id_0> body']

    def rows(split, shuffle_files, seed=None):
      n = {'train': 3, 'validation': 1, 'nothing': 0, 'unlabelled': 2}[split]
      label = tf.fill([n], '<unk>' if split == 'unlabelled' else 'food')
      return tf.data.Dataset.from_tensor_slices(
          {'inputs': tf.constant(TEXTS[:n], tf.string), 'targets': label, 'idx': tf.range(n)})

    def own_metric(targets, predictions):
      return {'own': float(len(targets))}

    def of_scores(targets, scores):
      return {'mean_score': sum(scores) / len(scores)}

    class Unserialisable:
      def __call__(self, targets, predictions):
        return {'callable': 1.0}

    def dev_rows(split, shuffle_files, seed=None):
      return rows('validation', shuffle_files)

    def add(name, metric_fns, postprocess_fn=None, source=seqio.FunctionDataSource(
        rows, splits=['train', 'validation', 'nothing', 'unlabelled'])):
      seqio.TaskRegistry.add(
          name,
          source=source,
          preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
          output_features={
              name: seqio.Feature(VOCABULARY, add_eos=True) for name in ('inputs', 'targets')},
          postprocess_fn=postprocess_fn,
          metric_fns=metric_fns)

    add('user_food', [own_metric, Unserialisable()], functools.partial(
        postprocessors.string_label_to_class_id, label_classes=['animal', 'food']))
    add('user_plain', [metrics.accuracy])
    add('user_scored', [metrics.accuracy, of_scores])
    add('user_dev', [], source=seqio.FunctionDataSource(dev_rows, splits=['dev']))
    seqio.MixtureRegistry.add('user_parts', ['user_food', 'user_dev'], default_rate=1)
    seqio.MixtureRegistry.add('user_mixture', [('user_food', 3), ('user_plain', 1.5)])
""")

load = functools.partial(load_task, task_module='user_tasks')


@pytest.fixture(scope='module', autouse=True)
def user_tasks(tmp_path_factory):
  """A user's own module of tasks, importable by its name."""
  folder = tmp_path_factory.mktemp('user')
  (folder / 'user_tasks.py').write_text(MODULE)
  sys.path.insert(0, str(folder))
  yield folder / 'user_tasks.py'
  sys.path.remove(str(folder))


@pytest.fixture
def without_seqio(monkeypatch):
  """Callable that makes importing seqio and TensorFlow fail from then on."""

  def hide():
    for name in ('seqio', 'tensorflow', 'tensorflow_datasets'):
      monkeypatch.setitem(sys.modules, name, None)

  return hide


def test_a_task_is_tokenised_with_the_models_vocabulary_in_a_fixed_order(vocabulary):
  task = load('user_food', 'train', vocabulary)
  texts = ['a small animal', 'the sweet fruit of a tree', 'part of <extra_id_0> body']
  for index, text in enumerate(texts):
    assert task[index]['inputs'].tolist() == [*vocabulary.encode(text), 1]
    assert task[index]['targets'].tolist() == [*vocabulary.encode('food'), 1]
    assert task.example(index) == {
        'idx': index, 'inputs_pretokenized': text, 'targets_pretokenized': 'food',
    }  # fmt: skip
  assert task.target(0) == 1
  assert task.label_classes == ['animal', 'food']
  assert vocabulary.sentinel_ids[0] in task[2]['inputs']


def test_vocabularies_have_files_of_their_own(vocabulary):
  other = Vocabulary(vocabulary.path, extra_ids=20)
  first, second = (load('user_food', 'train', v) for v in (vocabulary, other))
  assert second[2]['inputs'].max() == other.size - 1
  assert first[2]['inputs'].max() == vocabulary.size - 1
  again = load('user_food', 'train', vocabulary)
  np.testing.assert_array_equal(again[2]['inputs'], first[2]['inputs'])


def test_a_users_own_metrics_work_before_and_after_caching(vocabulary, monkeypatch):
  built = load('user_food', 'train', vocabulary)
  monkeypatch.setattr(seqio_source, 'tokenize_task', None)
  cached = load('user_food', 'train', vocabulary)
  for task in (built, cached):
    assert [metric([0, 1], [0, 1]) for metric in task.metric_fns] == [
        {'own': 2.0},
        {'callable': 1.0},
    ]
    assert task.postprocess_fn('food') == 1


@pytest.mark.parametrize(
    'text',
    ['<extra_id_0>.', '<extra_id_0>ly', 'a <extra_id_0>, b', '<extra_id_0> .', '<extra_id_0>  two',
     'a <extra_id_0> b <extra_id_1>', '<extra_id_0> <extra_id_1> x'],
)  # fmt: skip
def test_what_stands_behind_a_sentinel_has_the_ids_that_seqio_gives_it(vocabulary, text):
  seqio = seqio_source.import_seqio()
  theirs = seqio.SentencePieceVocabulary(vocabulary.path, vocabulary.extra_ids)
  assert vocabulary.encode(text) == theirs.encode_tf(text).numpy().tolist()


def test_a_mixture_is_no_task_and_says_of_what_it_is_one(vocabulary):
  with pytest.raises(ValueError, match='user_mixture is a mixture of user_food, user_plain'):
    load('user_mixture', 'train', vocabulary)


def test_metrics_over_scores_are_kept(vocabulary):
  accuracy, of_scores = load('user_scored', 'train', vocabulary).metric_fns
  assert accuracy(['food'], ['food']) == {'accuracy': 100.0}
  assert of_scores(['food', 'food'], [-1.0, -3.0]) == {'mean_score': -2.0}


def test_a_users_own_metrics_need_seqio_and_say_so(vocabulary, without_seqio):
  load('user_food', 'train', vocabulary)
  without_seqio()
  task = load('user_food', 'train', vocabulary)
  assert task.target(2) == 1
  with pytest.raises(ValueError, match='user_tasks:own_metric.*only where seqio is installed'):
    task.metric_fns  # noqa: B018


def test_a_change_of_the_tasks_code_makes_the_cache_old(
    vocabulary, user_tasks, monkeypatch
):
  load('user_plain', 'train', vocabulary)
  calls = []
  tokenize = seqio_source.tokenize_task
  monkeypatch.setattr(
      seqio_source, 'tokenize_task', lambda *a, **k: calls.append(a) or tokenize(*a, **k)
  )
  load('user_plain', 'train', vocabulary)
  assert not calls
  user_tasks.write_text(MODULE + '\n# changed\n')
  load('user_plain', 'train', vocabulary)
  assert len(calls) == 1
  user_tasks.write_text(MODULE)


def test_a_damaged_cache_is_named_and_made_again(vocabulary):
  load('user_food', 'train', vocabulary)
  path = cache.cache_path('user_food', 'train', vocabulary)
  with open(path, 'r+b') as file:
    file.truncate(200)
  with pytest.warns(UserWarning, match='user_food.*is truncated.*made again'):
    task = load('user_food', 'train', vocabulary)
  assert len(task) == 3
  assert len(load('user_food', 'train', vocabulary)) == 3


def test_a_cache_of_the_format_before_is_made_again(vocabulary):
  task = load('user_food', 'train', vocabulary)
  del task.manifest['unlabelled']
  task.manifest |= {'format': 1, 'has_labels': True}
  task.save(cache.cache_path('user_food', 'train', vocabulary))
  with pytest.warns(UserWarning, match='format 1.*made again'):
    again = load('user_food', 'train', vocabulary)
  again.require_labels()
  load('user_food', 'train', vocabulary).require_labels()


def test_unknown_names_are_answered_with_the_nearest(vocabulary):
  with pytest.raises(ValueError, match="No task or mixture 'user_fod'.*mean 'user_food'"):
    load('user_fod', 'train', vocabulary)
  with pytest.raises(ValueError, match="no split 'valid'. Did you mean 'validation'.*nothing"):
    load('user_food', 'valid', vocabulary)
  with pytest.raises(ImportError, match="'no_such_tasks' that should register"):
    load_task('user_food', 'dev', vocabulary, task_module='no_such_tasks')


def test_an_empty_split_is_an_error(vocabulary):
  with pytest.raises(ValueError, match="user_food, split 'nothing', is empty"):
    load('user_food', 'nothing', vocabulary)


def test_a_split_without_labels_is_marked(vocabulary):
  assert not load('user_food', 'unlabelled', vocabulary).has_labels
  assert load('user_food', 'validation', vocabulary).has_labels


def test_a_mixture_is_its_tasks_and_rates_also_from_the_cache(vocabulary, without_seqio):
  load_mixture = functools.partial(
      load_task_or_mixture, 'user_mixture', 'train', vocabulary, task_module='user_tasks'
  )
  first = [(task.name, rate) for task, rate in load_mixture()]
  assert first == [('user_food', 3.0), ('user_plain', 1.5)]
  without_seqio()
  assert [(task.name, rate) for task, rate in load_mixture()] == first


def test_of_a_mixture_only_the_tasks_with_the_split_are_loaded(vocabulary, without_seqio):
  load_mixture = functools.partial(
      load_task_or_mixture, 'user_parts', vocabulary=vocabulary, task_module='user_tasks'
  )
  for split, expected in [('train', ['user_food']), ('dev', ['user_dev'])]:
    assert [task.name for task, _ in load_mixture(split=split)] == expected
  with pytest.raises(ValueError, match="No task of the mixture user_parts has a split 'test'.*"):
    load_mixture(split='test')
  without_seqio()
  assert [task.name for task, _ in load_mixture(split='dev')] == ['user_dev']
  # A task that says that it has the split is not left out for want of a cache file.
  with pytest.raises(FileNotFoundError, match="No tokenised user_food, split 'validation'"):
    load_mixture(split='validation')


def test_the_command_fills_the_cache(vocabulary, tmp_path, capsys):
  cache.main([
      'user_mixture', 'train', 'validation', f'--vocabulary={vocabulary.path}',
      '--task_module=user_tasks', f'--cache_dir={tmp_path / "carried"}',
  ])  # fmt: skip
  files = sorted(path.name for path in (tmp_path / 'carried').glob('*/*.safetensors'))
  assert len(files) == 4
  assert 'user_food train: 3 examples in ' in capsys.readouterr().out
