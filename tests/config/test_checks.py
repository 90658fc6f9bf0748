"""What a command's settings are checked for before anything large is read."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from prompt_tuning_jax import artifact, cli, config, initializers, partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.config import building, registry
from prompt_tuning_jax.data import cache, seqio_source
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.typing import Injection


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))


@pytest.fixture
def dry_run(capsys, backbone_dir, monkeypatch):
  """Runs a command dry and returns its status and errors; weights must not be read."""

  def refuse(self):
    raise AssertionError('a dry run must not load weights')

  monkeypatch.setattr(Backbone, 'params', property(refuse))

  def run(command, *flags):
    shared = [f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}']
    if command in ('train', 'evaluate'):
      shared += [
          '--gin.MIXTURE_OR_TASK_NAME=demo_gloss_category',
          "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}",
      ]
    if command in ('train', 'adapt'):
      shared.append('--gin.MODEL_DIR=run')
    status = cli.main([command, *shared, *flags, '--dry_run'])
    return status, capsys.readouterr().err

  return run


@pytest.fixture
def prompt_file(backbone_dir, tmp_path):
  path = str(tmp_path / 'prompt.safetensors')
  artifact.save_prompt(
      path,
      Injection(virtual_embeddings=np.ones((3, 16), np.float32)),
      backbone=load_backbone(backbone_dir),
  )
  return path


@pytest.mark.parametrize(
    ('command', 'flag', 'answer'),
    [
        ('train', '--gin.MICROBATCHES=5', 'MICROBATCHES=5 does not divide BATCH_SIZE=32'),
        ('train', '--gin.BATCH_SIZE=6', 'BATCH_SIZE=6 does not divide among the 4 parts into '
         "which the mesh {'data': 4, 'model': 1} splits a batch. Use 4 or 8 rows, or "
         'let more devices share a copy of the model: NUM_PARTITIONS=2 or 4.'),
        ('train', '--gin.MICROBATCHES=16', 'a part of 2 rows (BATCH_SIZE=32 in MICROBATCHES=16) '
         'does not divide among the 4 parts'),
        ('train', '--gin.NUM_PARTITIONS=3', 'NUM_PARTITIONS=3 (make_mesh.model), the devices '
         'that share a copy of the model, does not divide the 4 devices there are. It may be '
         '1, 2, 4'),
        ('train', "--gin.LOGICAL_AXIS_RULES=[('embed', 'data')]", 'has no rule for batch, vocab, '),
        ('train', "--gin.LOGICAL_AXIS_RULES=[('vocab', 'expert'), ('embed', None), "
         "('layers', None), ('mlp', None), ('heads', None), ('joined_kv', None), "
         "('relpos_buckets', None)]", "splits 'vocab' over 'expert'; it may be 'data' or 'mod"),
        ('train', "--gin.LOGICAL_AXIS_RULES=[('batch', None), ('vocab', None), ('embed', None), "
         "('layers', None), ('mlp', None), ('heads', None), ('joined_kv', None), "
         "('relpos_buckets', None)]", "leave ('batch', 'data') as it is"),
        ('plan', '--gin.LENGTHS=packk', "LENGTHS is 'packk'"),
        ('plan', '--gin.PLAN_TARGET=0xH100-80GB', 'at least one device'),
        ('plan', '--gin.NUM_PARTITIONS=3', 'NUM_PARTITIONS=3 does not divide the '),
        ('train', '--gin.PLACEMENT=prefx', "No placement 'prefx'"),
        ('train', "--gin.PLACEMENT=(3, 'inputs')", 'places for 3 virtual tokens, but'),
        ('train', '--gin.PLACEMENT={3} {inputs} {3}', 'places for 6 virtual tokens, but'),
        ('train', '--gin.PLACEMENT={3} {inputs', 'Braces come in pairs'),
        ('train', '--gin.PROMPT_LENGTH=@slots_of()', "PLACEMENT is 'prefix', which has none"),
        ('train', '--gin.LENGTHS=pak', "LENGTHS is 'pak'; it may be 'pad' or 'bucket' or 'pack'."),
        ('train', '--gin.PACKED_LENGTH=0', 'PACKED_LENGTH'),
        ('train', '--gin.EVAL_METHOD=ranking', "EVAL_METHOD is 'ranking'; it may be 'rank'"),
        ('train', "--gin.train.best_mode='most'", "best_mode is 'most'"),
        ('train', '--gin.BEST_MODE=most', "best_mode is 'most'"),
        ('train', '--gin.MODEL_DIR=gs://b/run', 'gs://b/run is not on this machine'),
        ('evaluate', '--gin.EVAL_OUTPUT_DIR=gs://b/e', 'gs://b/e is not on this machine'),
        ('train', '--gin.CACHE_DIR=gs://b/c', 'gs://b/c is not on this machine'),
        ('train', '--gin.train.keep_checkpoints=0', 'keep_checkpoints is 0'),
        ('train', '--gin.train.log_period=0', 'log_period is 0'),
        ('train', "--gin.TRAINABLE={'promt': @adafactor()}", "['promt'], which leads to no"),
        ('train', '--gin.MIXTURE_OR_TASK_NAME=demo_glos', "No task or mixture 'demo_glos'"),
        ('train', '--gin.EVAL_TASK_NAME=nope', "No task or mixture 'nope'"),
        ('train', '--gin.MIXTURE_OR_TASK_MODULE=no.where', "Cannot import the module 'no.wh"),
        ('train', "--gin.MIXTURE_OR_TASK_MODULE='prompt_tuning.data.glue'", 'own: leave it out'),
        ('evaluate', '--gin.MIXTURE_OR_TASK_NAME=nope', "No task or mixture 'nope'"),
        ('evaluate', '--gin.CHECKPOINT_PATH=/nope', 'CHECKPOINT_PATH /nope holds no saved'),
        ('evaluate', '--gin.PROMPT_FILE=/nope', 'PROMPT_FILE: there is no file /nope'),
        ('evaluate', '--gin.LENGTHS=pak', "LENGTHS is 'pak'"),
        ('evaluate', '--gin.EVAL_METHOD=x', "EVAL_METHOD is 'x'"),
        ('evaluate', '--gin.PLACEMENT=prefx', "No placement 'prefx'"),
        ('infer', '--gin.PROMPT_FILE=/nope', 'PROMPT_FILE: there is no file /nope'),
        ('infer', '--gin.PLACEMENT=prefx', "No placement 'prefx'"),
        ('infer', '--gin.ENSEMBLE=votes', "ENSEMBLE is 'votes'; prompts answer together by"),
        ('evaluate', '--gin.ENSEMBLE=votes', "ENSEMBLE is 'votes'"),
        ('evaluate', '--gin.ENSEMBLE=vote', 'is of several prompts, but PROMPT_FILE names none'),
    ],
)
def test_a_dry_run_finds_what_the_run_would(dry_run, command, flag, answer):
  status, errors = dry_run(command, flag)
  assert status == 2
  assert answer in errors
  assert 'Traceback' not in errors


def test_a_dry_run_finds_packed_rows_that_hold_no_more_than_the_prompt(dry_run):
  status, errors = dry_run('train', '--gin.LENGTHS=pack', '--gin.PACKED_LENGTH=100')
  assert status == 2
  assert 'PACKED_LENGTH=100 leaves no room for an input beside the 100 virtual' in errors
  assert dry_run('train', '--gin.LENGTHS=pack', '--gin.PACKED_LENGTH=116')[0] == 0
  assert dry_run('train', '--gin.LENGTHS=pack')[0] == 0


def test_a_dry_run_finds_an_encoder_that_does_not_fit_the_model(dry_run):
  flags = ['--gin_file=methods/p_tuning', '--gin.PTuning.lstm_width=0.55']
  status, errors = dry_run('train', *flags)
  assert status == 2
  assert '0.55 × d_model=16 is 8.8, which is no number of units' in errors


def test_words_that_fill_the_input_are_found_before_the_run(dry_run):
  words = 'it is what it is, ' * 5
  status, errors = dry_run(
      'train', '--gin.PROMPT_LENGTH=1', f'--gin.PLACEMENT={words} {{1}} {{inputs}}'
  )
  assert status == 2
  assert 'leaves nothing of an input length of 16 for the example' in errors


def test_a_prompt_may_be_as_long_as_its_template_has_slots(dry_run):
  flags = ['--gin.PLACEMENT={3} {inputs} {4}', '--gin.PROMPT_LENGTH=@slots_of()']
  assert dry_run('train', *flags) == (0, '')


def test_a_dry_run_finds_a_prompt_to_start_from_that_is_not_there(dry_run):
  status, errors = dry_run('train', '--gin_file=from_file', '--gin.PROMPT_FILE=/nope.npy')
  assert status == 2
  assert '/nope.npy' in errors


def test_a_dry_run_reads_prompts_and_holds_them_against_the_model(
    dry_run, prompt_file, tmp_path
):
  for command in ('evaluate', 'infer'):
    assert dry_run(command, f'--gin.PROMPT_FILE={prompt_file}') == (0, '')
  np.save(tmp_path / 'wide.npy', np.ones((3, 17), np.float32))
  status, errors = dry_run('evaluate', '--gin.PROMPT_FILE=wide.npy')
  assert status == 2
  assert '17' in errors and '16' in errors


def test_a_dry_run_finds_prompts_that_cannot_answer_together(dry_run, prompt_file, tmp_path):
  keys = np.zeros((1, 2, 2, 8), np.float32)
  deep = Injection(encoder_kv=(keys + 1, keys + 1))
  artifact.save_prompt(tmp_path / 'deep.safetensors', deep)
  flag = f"--gin.PROMPT_FILE=['{prompt_file}', 'deep.safetensors']"
  for command in ('evaluate', 'infer'):
    status, errors = dry_run(command, flag, '--gin.ENSEMBLE=vote')
    assert status == 2
    assert 'only if they are of one kind' in errors
  assert dry_run('evaluate', flag) == (0, '')


def test_a_task_that_is_tokenised_already_needs_no_seqio(dry_run, backbone_dir, monkeypatch):
  monkeypatch.setattr(
      seqio_source, 'import_seqio', lambda: pytest.fail('seqio was imported')
  )
  vocabulary = load_backbone(backbone_dir).vocabulary
  path = Path(cache.cache_path('mine', 'validation', vocabulary))
  path.parent.mkdir(parents=True)
  path.touch()
  assert dry_run('evaluate', '--gin.MIXTURE_OR_TASK_NAME=mine') == (0, '')


def test_a_dry_run_looks_for_the_files_of_a_task_of_files(dry_run, tmp_path):
  flags = [
      '--gin.MIXTURE_OR_TASK_NAME=@FileTask()',
      '--gin.FileTask.name=mine',
      "--gin.FileTask.files={'train': 'a.tsv', 'validation': 'b.tsv'}",
      '--gin.FileTask.inputs={text}',
      '--gin.FileTask.targets=label',
  ]
  for command, missing in (('train', 'a.tsv'), ('evaluate', 'b.tsv'), ('tasks', 'a.tsv')):
    status, errors = dry_run(command, *flags)
    assert status == 2
    assert f'no file {tmp_path}/{missing}, which FileTask.files names' in errors
  (tmp_path / 'b.tsv').touch()
  assert dry_run('evaluate', *flags) == (0, '')
  status, errors = dry_run('evaluate', *flags, '--gin_file=methods/prompt_design')
  assert status == 2
  assert f'no file {tmp_path}/a.tsv, which FileTask.files names for the split' in errors
  (tmp_path / 'b.tsv').unlink()
  (tmp_path / 'a.tsv').touch()
  assert dry_run('tasks', *flags) == (0, '')
  status, errors = dry_run('train', *flags)
  assert status == 2
  assert f'no file {tmp_path}/b.tsv' in errors
  (tmp_path / 'b.tsv').touch()
  assert dry_run('train', *flags) == (0, '')
  status, errors = dry_run('train', *flags, "--gin.FileTask.metrics=['acuracy']")
  assert status == 2
  assert "Did you mean 'accuracy'?" in errors


def test_both_a_prompt_and_a_checkpoint_are_one_too_many(dry_run, prompt_file):
  status, errors = dry_run(
      'evaluate', f'--gin.PROMPT_FILE={prompt_file}', '--gin.CHECKPOINT_PATH=run'
  )
  assert status == 2
  assert 'both set' in errors


@pytest.mark.parametrize(
    ('command', 'flag', 'answer'),
    [
        ('evaluate', '--gin.PromptDesign.examples=-1', 'PromptDesign.examples is -1; expected a'),
        ('evaluate', '--gin.PromptDesign.template=what?', 'names no field of the example'),
        ('evaluate', '--gin.PLACEMENT={inputs} it is', 'both say what stands around an input'),
        ('evaluate', '--gin.PROMPT_DESIGN=few', 'PROMPT_DESIGN=few'),
        ('infer', '--gin.PromptDesign.examples=2', 'infer knows no task to draw them from. Set'),
        ('tasks', '--gin.PROMPT=@SoftPrompt()', 'PROMPT_DESIGN and PROMPT=@SoftPrompt() are both'),
    ],
)
def test_a_design_is_checked_before_the_run(dry_run, command, flag, answer):
  status, errors = dry_run(command, '--gin.PROMPT_DESIGN=@PromptDesign()', flag)
  assert status == 2
  assert answer in errors
  assert 'Traceback' not in errors


@pytest.mark.parametrize('command', ['evaluate', 'infer'])
def test_a_design_and_a_tuned_prompt_are_one_too_many(dry_run, prompt_file, command):
  design = ['--gin_file=methods/prompt_design', '--gin.PromptDesign.examples=0']
  assert dry_run(command, *design) == (0, '')
  status, errors = dry_run(command, *design, f'--gin.PROMPT_FILE={prompt_file}')
  assert status == 2
  assert f'PROMPT_DESIGN and PROMPT_FILE={prompt_file} are both set' in errors
  if command == 'evaluate':
    status, errors = dry_run(command, *design, '--gin.CHECKPOINT_PATH=run')
    assert status == 2
    assert 'PROMPT_DESIGN and CHECKPOINT_PATH=run are both set' in errors


def test_a_design_is_not_trained(dry_run):
  status, errors = dry_run('train', '--gin_file=methods/prompt_design')
  assert status == 2
  assert 'nothing would train. Tune the model with --gin_file=methods/model_tuning' in errors
  assert 'words around the input (PROMPT_DESIGN) are not trained, `evaluate` scores' in errors
  assert dry_run('train', '--gin_file=methods/model_tuning') == (0, '')


def test_a_dry_run_of_adaptation_checks_its_batches_and_what_trains(dry_run, tmp_path):
  (tmp_path / 'text.txt').write_text('some words\n' * 10)
  flags = ["--gin.TEXT_FILES=['text.txt']", '--gin.BATCH_SIZE=8']
  assert dry_run('adapt', *flags) == (0, '')
  status, errors = dry_run('adapt', *flags, '--gin.MICROBATCHES=3')
  assert status == 2
  assert "MICROBATCHES=3 does not divide the batch_size=8 of component 'text'" in errors
  status, errors = dry_run('adapt', *flags, "--gin.TRAINABLE={'prompt': @adafactor()}")
  assert status == 2
  assert "['prompt'], which leads to no parameter" in errors


def test_the_real_run_is_checked_before_it_begins(backbone_dir, monkeypatch, capsys):
  def train(**kwargs):
    raise AssertionError('the run has begun')

  monkeypatch.setattr(registry, 'command_function', lambda name: train)
  status = cli.main([
      'train',
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      '--gin.MIXTURE_OR_TASK_NAME=demo_gloss_category',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}",
      '--gin.MODEL_DIR=run',
      '--gin.LENGTHS=pak',
  ])
  assert status == 2
  assert "LENGTHS is 'pak'" in capsys.readouterr().err


@pytest.mark.parametrize('command', ['evaluate', 'export'])
@pytest.mark.parametrize('name', ['', 'checkpoint_3'])
def test_a_run_that_made_a_backbone_is_told_from_one_that_made_a_prompt(
    dry_run, tmp_path, command, name
):
  StateSaver(tmp_path / 'adapted').save(
      3, {'x': np.zeros(2)}, description={'task': 'pretraining'}
  )
  flags = [f'--gin.CHECKPOINT_PATH={tmp_path / "adapted" / name}']
  if command == 'export':
    flags.append('--gin.PROMPT_FILE=out.safetensors')
  status, errors = dry_run(command, *flags)
  assert status == 2
  assert f'INITIAL_CHECKPOINT_PATH={tmp_path}/adapted/backbone' in errors
  flags.append(f'--gin.CHECKPOINT_PATH={tmp_path}/adapted/checkpoint_4')
  status, errors = dry_run(command, *flags)
  assert status == 2
  assert 'checkpoint_4 holds no saved state' in errors


def test_export_says_what_it_needs(dry_run):
  status, errors = dry_run('export', '--gin.CHECKPOINT_PATH=x', '--gin.PROMPT_FILE=None')
  assert status == 2
  assert 'PROMPT_FILE is None, but export needs it' in errors
  several = "--gin.PROMPT_FILE=['a', 'b']"
  status, errors = dry_run('export', '--gin.CHECKPOINT_PATH=x', several)
  assert status == 2
  assert 'PROMPT_FILE' in errors and 'Traceback' not in errors


def test_what_is_imported_may_lie_in_a_bucket(dry_run, tmp_path):
  flags = '--gin.IMPORT_PATH=gs://b/run/checkpoint_5', f'--gin.PROMPT_FILE={tmp_path}/new'
  # It is asked there, by what reads buckets; this one's name is too short for one.
  assert 'Invalid GCS bucket name' in dry_run('import', *flags)[1]


def test_decoding_needs_a_length_where_nothing_gives_one(dry_run):
  status, errors = dry_run(
      'train', '--gin.TASK_FEATURE_LENGTHS=None', '--gin.DECODING=@Decoding()'
  )
  assert status == 2
  assert 'set TASK_FEATURE_LENGTHS, or --gin.Decoding.max_length=N' in errors


def test_shapes_of_a_prompt_are_known_without_the_embeddings(backbone_dir, monkeypatch):
  backbone = load_backbone(backbone_dir)
  method = SoftPrompt(5, initializers.sampled_vocab(backbone))
  params, injection = method_lib.shapes(method, backbone.spec)
  assert jax.tree.map(lambda leaf: leaf.shape, params) == {'prompt': (5, 16)}
  assert injection.virtual_embeddings.shape == (5, 16)
  assert 'params' not in vars(backbone)


def test_int8_is_refused_for_a_model_that_trains(dry_run):
  assert dry_run('train', '--gin.PARAM_DTYPE=int8')[0] == 0
  status, errors = dry_run(
      'train', '--gin_file=methods/p_tuning_co_tuning', '--gin.PARAM_DTYPE=int8'
  )
  assert status == 2 and 'of type int8' in errors and 'PARAM_DTYPE=None' in errors
  status, errors = dry_run('train', '--gin.DTYPE=int8')
  assert status == 2 and 'dtype is int8; it may be float32 or bfloat16' in errors


def test_attention_without_dropout_is_refused_with_dropout(dry_run):
  status, errors = dry_run('train', '--gin.ATTENTION=dot_product')
  assert status == 2 and "ATTENTION='dot_product' knows no dropout" in errors
  for attention in ('dot_product', 'cudnn'):  # The GPUs of a run need not be here.
    flags = [f'--gin.ATTENTION={attention}', '--gin.DROPOUT_RATE=0.0']
    status, errors = dry_run('train', *flags)
    assert status == 0, errors
  status, errors = dry_run('train', '--gin.ATTENTION=flash')
  assert status == 2 and "ATTENTION is 'flash'" in errors


def test_what_the_mesh_cannot_split_is_a_note(dry_run):
  # Two heads do not divide among four devices; the width of 16 and the vocabulary do.
  status, errors = dry_run('train', '--gin.NUM_PARTITIONS=4')
  assert status == 0, errors
  assert (
      "note: The 4 devices of the mesh axis 'model' do not divide the model's heads (2), so "
      'that the 4 compute attention together and not each some heads;'
  ) in errors
  status, errors = dry_run('train', '--gin.NUM_PARTITIONS=2', '--gin.BATCH_SIZE=2')
  assert (status, 'mesh' in errors) == (0, False), errors


def test_a_mesh_that_splits_nothing_of_the_model_is_refused():
  mesh = partitioning.make_mesh(4)
  module = T5(T5Config(62, 6, 3, 2, 10, 1, 1))
  shapes = jax.eval_shape(module.init_params, jax.random.key(0))
  with pytest.raises(ValueError, match=r"4 devices .* 'model' divide none .*vocab 62.*heads 3"):
    partitioning.not_split(mesh, module.logical_axes(), shapes)
  # Over one device nothing has to be split.
  assert not partitioning.not_split(partitioning.make_mesh(1), module.logical_axes(), shapes)


@pytest.mark.parametrize(
    ('flags', 'mesh', 'shard'),
    [
        ([], {'data': 4, 'model': 1}, (1, 16, 32)),
        (['NUM_PARTITIONS=2'], {'data': 2, 'model': 2}, (1, 16, 16)),
        (['PARAMETER_PARTITIONING_DIMS=2'], {'data': 4, 'model': 1}, (1, 4, 32)),
    ],
)
def test_the_mesh_is_that_of_the_macros(backbone_dir, elsewhere, flags, mesh, shard):
  needed = ['MODEL_DIR=run', 'MIXTURE_OR_TASK_NAME=x', f'INITIAL_CHECKPOINT_PATH={backbone_dir}']
  needed.append("TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}")
  backbone = config.parse('train', (), [*needed, *flags]).kwargs()['backbone']
  assert dict(backbone.mesh.shape) == mesh
  kernel = backbone.params['encoder']['layers']['mlp']['wi_0']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == shard


def test_one_device_has_no_mesh(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  assert building.make_mesh() is None
  monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
  with pytest.raises(ValueError, match='NUM_PARTITIONS=2 .* may be 1'):
    building.make_mesh(2)
