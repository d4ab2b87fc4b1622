"""Warm starts: what fits is taken, what is new is said."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from longctx.models import TransformerConfig
from longctx.pretrained.loading import flatten, load
from longctx.tasks import task_defaults
from longctx.training import runs, trainer, warm_start
from longctx.training.config import ExperimentConfig
from longctx.training.errors import CheckpointError
from longctx.training.metrics_log import read_metrics
from tests.pretrained.make_fixtures import FOLDER

TASK = task_defaults(
  'copying', seq_len=16, num_symbols=8, min_length=2, max_length=4
)
CONFIG = ExperimentConfig(
  task=TASK,
  steps=2,
  batch_size=4,
  model=dataclasses.replace(
    load(FOLDER / 'llama').model.config, dtype='float32'
  ),
)


def make(tmp_path, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  (run,) = runs.prepare(config, tmp_path)
  warm_start.check(run)
  return run


def parameters(tmp_path, **changes):
  made = trainer.Trainer(make(tmp_path, **changes))
  found = flatten(jax.tree.map(np.asarray, made.state['params']))
  made.close()
  return found


def of_fixture(case='llama'):
  model = load(FOLDER / case).model
  return flatten(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))


def test_all_of_a_pretrained_model_is_taken(tmp_path, capsys):
  found = parameters(tmp_path, init_from=str(FOLDER / 'llama'))
  for path, value in of_fixture().items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)
  assert 'takes 21 arrays, 5,840 numbers' in capsys.readouterr().err


def test_other_layers_and_a_larger_vocabulary_take_what_fits(tmp_path, capsys):
  model = dataclasses.replace(
    CONFIG.model, layers=('full', 'gla(gate_rank=2)'), vocab_size=30
  )
  origin = str(FOLDER / 'llama')
  found = parameters(tmp_path / 'warm', init_from=origin, model=model)
  cold = parameters(tmp_path / 'cold', model=model)
  old, said = of_fixture(), capsys.readouterr().err
  np.testing.assert_array_equal(found['embedding'][:24], old['embedding'])
  np.testing.assert_array_equal(found['embedding'][24:], cold['embedding'][24:])
  np.testing.assert_array_equal(found['head'][:, :24], old['head'])
  query = 'blocks/1/attention/query/kernel'
  np.testing.assert_array_equal(found[query], old[query])
  gate = 'blocks/1/attention/gate/kernel'
  np.testing.assert_array_equal(found[gate], cold[gate])
  assert 'takes 24 rows of embedding, of 30' in said
  assert 'blocks/{1}/attention/gate/kernel' in said
  assert "layers: ('full', 'full') -> ('full', 'gla(gate_rank=2)')" in said


def test_a_workdir_is_an_origin_at_any_of_its_steps(tmp_path):
  first = make(tmp_path / 'first')
  trainer.train([first], tmp_path / 'first')
  origin = warm_start.open_origin(f'{tmp_path / "first"}:2')
  found = parameters(tmp_path / 'second', init_from=f'{tmp_path / "first"}')
  for path, value in origin.parameters():
    np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_resumed_run_reads_its_own_checkpoint(tmp_path, capsys):
  # The origin may be gone by then.
  config = dict(init_from=str(FOLDER / 'llama'))
  trainer.train([make(tmp_path, **config)], tmp_path)
  capsys.readouterr()
  trainer.train([make(tmp_path, **config, steps=2)], tmp_path)
  assert 'takes' not in capsys.readouterr().err


@pytest.mark.parametrize('step', ['', ':7'])
def test_an_origin_that_has_saved_nothing_is_refused_first(tmp_path, step):
  (tmp_path / 'origin' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(CheckpointError, match='no such checkpoint'):
    make(tmp_path / 'run', init_from=f'{tmp_path}/origin{step}')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'init_from': 'nowhere'}, 'nowhere'),
    (
      {
        'init_from': str(FOLDER / 'llama'),
        'model': TransformerConfig(d_model=24),
      },
      'nothing that fits',
    ),
    (
      {'init_from': str(FOLDER / 'llama'), 'transfer': 1},
      'those of init_from are the same',
    ),
    ({'transfer': 1}, 'init_from, which is empty'),
  ],
)
def test_a_start_that_cannot_be_is_refused(tmp_path, changes, message):
  if 'transfer' in changes:
    steps = changes['transfer']
    kind = type(CONFIG.transfer)
    changes = {**changes, 'transfer': kind(steps=steps)}
  with pytest.raises(ValueError, match=message):
    make(tmp_path, **changes)


def test_exchanged_layers_learn_the_outputs_of_the_old_ones_alone(tmp_path):
  model = dataclasses.replace(
    CONFIG.model, layers=('full', 'sliding_window(window=6)')
  )
  run = make(
    tmp_path,
    init_from=str(FOLDER / 'llama'),
    model=model,
    transfer=type(CONFIG.transfer)(steps=20),
    steps=20,
    log=dataclasses.replace(CONFIG.log, every=1),
    optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=1e-2),
  )
  made = trainer.Trainer(run)
  with trainer.StopRequest() as stop:
    made.run(stop)
  found, old = flatten(made.state['params']), of_fixture()
  made.close()
  for path, value in old.items():
    same = np.array_equal(found[path], value)
    assert same != path.startswith('blocks/1/attention/'), path
  losses = [r['loss'] for r in read_metrics(tmp_path) if r['split'] == 'train']
  assert losses[-1] < 0.8 * losses[0]


def test_a_transfer_without_accumulation_says_so():
  with pytest.raises(ValueError, match=r'take optimizer\.accumulation=1'):
    dataclasses.replace(
      CONFIG,
      init_from='x',
      transfer=type(CONFIG.transfer)(steps=1),
      optimizer=dataclasses.replace(CONFIG.optimizer, accumulation=2),
    )


@pytest.mark.parametrize('transferred', [0, 3])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, transferred):
  changes = dict(
    init_from=str(FOLDER / 'llama'),
    model=dataclasses.replace(
      CONFIG.model, layers=('full', 'sliding_window(window=6)')
    ),
    transfer=type(CONFIG.transfer)(steps=transferred),
    optimizer=dataclasses.replace(CONFIG.optimizer, schedule_steps=5),
  )

  def train(folder, steps):
    run = make(folder, **changes, steps=steps)
    made = trainer.Trainer(run)
    with trainer.StopRequest() as stop:
      made.run(stop)
    found = flatten(jax.tree.map(np.asarray, made.state['params']))
    made.close()
    return found

  whole = train(tmp_path / 'whole', 5)
  train(tmp_path / 'parts', 2)
  parts = train(tmp_path / 'parts', 5)
  for path, value in whole.items():
    np.testing.assert_array_equal(parts[path], value, err_msg=path)
