"""Training: interruptions change nothing, and divergence is caught."""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.training import config as config_lib
from longctx.training import (
  figures,
  log_files,
  metrics_log,
  phase,
  runs,
  signals,
  steps,
  trainer,
)
from longctx.training import results as results_lib
from longctx.training.config import ExperimentConfig
from longctx.training.errors import (
  NotFiniteError,
  StoppedError,
)
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def run_to_end(config, workdir):
  prepared = runs.prepare(config, workdir)
  return trainer.train(prepared, workdir)


def final_leaves(workdir):
  """Digests of every leaf of the last checkpoint, and the data position."""
  steps_there = [int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*')]
  folder = workdir / 'checkpoints' / str(max(steps_there))
  leaves = json.loads((folder / 'meta' / 'metadata').read_text())['leaves']
  return leaves, json.loads((folder / 'data' / 'metadata').read_text())


def logged(workdir):
  rows = log_files.read_lines(workdir / 'metrics.jsonl')
  for row in rows:
    for key in ('tokens_per_second', 'seconds'):
      row.pop(key, None)
  return rows


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of a run that was never interrupted, and its results."""
  workdir = tmp_path_factory.mktemp('finished')
  return workdir, run_to_end(tiny_config(), workdir)


def test_run_writes_what_the_design_promises(finished):
  workdir, results = finished
  result = results['']
  assert json.loads((workdir / 'results.json').read_text()) == result
  assert result['steps'] == 12
  assert result['chance'] == 1 / 8
  assert result['analysis_share'] is None
  versions = json.loads((workdir / 'versions.json').read_text())
  assert versions['jax'] == jax.__version__
  stored = json.loads((workdir / 'config.json').read_text())
  loaded = config_lib.from_config_dict(ExperimentConfig, stored)
  assert loaded == tiny_config()
  rows = logged(workdir)
  seen = [(row['step'], row['split']) for row in rows]
  assert sorted(seen) == [
    (4, 'train'),
    (6, 'validation'),
    (8, 'train'),
    (12, 'train'),
    (12, 'validation'),
  ]
  assert (workdir / 'figures' / 'training.png').stat().st_size > 5000


def test_same_command_on_a_finished_run_trains_nothing(finished, capsys):
  workdir, results = finished
  before = final_leaves(workdir)
  assert run_to_end(tiny_config(), workdir) == results
  assert final_leaves(workdir) == before
  assert 'already finished' in capsys.readouterr().err


class StopAt(signals.StopRequest):
  """A stop request that comes with the training step `at`."""

  def __init__(self, running, at):
    super().__init__()
    self._trainer, self._at = running, at

  def due(self):
    self.signum = signal.SIGTERM
    return self._trainer.step >= self._at


@pytest.mark.parametrize('at', [1, 7])
def test_stopped_and_continued_run_equals_an_uninterrupted_one(
  finished, tmp_path, at
):
  # 7 lies within a logged interval: its sums must be carried over too.
  (run,) = runs.prepare(tiny_config(), tmp_path)
  running = trainer.Trainer(run)
  with pytest.raises(StoppedError, match=f'saved step {at} of 12'):
    running.run(StopAt(running, at))
  running.close()
  # A crash in between leaves lines of steps that will be made again.
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': 11, 'split': 'train'}) + '\n{"step": 1')
  run_to_end(tiny_config(), tmp_path)
  assert final_leaves(tmp_path) == final_leaves(finished[0])
  assert logged(tmp_path) == logged(finished[0])


def test_damaged_last_checkpoint_costs_steps_and_changes_nothing(
  finished, tmp_path, capsys
):
  (run,) = runs.prepare(tiny_config(), tmp_path)
  running = trainer.Trainer(run)
  with pytest.raises(StoppedError):
    running.run(StopAt(running, 8))
  running.close()
  for path in (tmp_path / 'checkpoints' / '8' / 'params').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[::-1])
  run_to_end(tiny_config(), tmp_path)
  assert 'checkpoint 8 is damaged' in capsys.readouterr().err
  assert (tmp_path / 'damaged_checkpoints' / '8').is_dir()
  assert final_leaves(tmp_path) == final_leaves(finished[0])
  assert logged(tmp_path) == logged(finished[0])


def start(workdir, compiled):
  """train.py on a run of a few seconds, in a process of its own."""
  command = [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT / "configs" / "default.py"}',
    '--config.task.seq_len=16',
    '--config.task.vocab_size=16',
    '--config.task.num_pairs=2',
    "--config.model.layers=('linear',)",
    '--config.model.d_model=16',
    '--config.steps=400',
    '--config.batch_size=4',
    '--config.eval.every=100',
    '--config.checkpoint.every=20',
    '--config.log.every=10',
    f'--workdir={workdir}',
  ]
  # One device, as on a user's machine: pytest's eight are its own.
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  env['JAX_COMPILATION_CACHE_DIR'] = str(compiled)
  env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  return subprocess.Popen(
    command,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for_checkpoint(process, workdir):
  while not any((workdir / 'checkpoints').glob('[0-9]*[0-9]')):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """A compilation cache for the processes, which all run one program."""
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, compiled):
  workdir = tmp_path_factory.mktemp('undisturbed')
  process = start(workdir, compiled)
  assert process.wait() == 0, process.communicate()[0]
  process.communicate()
  return workdir


def test_sigkill_at_a_random_step_changes_no_bit(
  undisturbed, compiled, tmp_path
):
  process = start(tmp_path, compiled)
  wait_for_checkpoint(process, tmp_path)
  # Anywhere: within a step, a validation or a write.
  time.sleep(random.random() / 2)
  process.kill()
  process.communicate()
  assert not (tmp_path / 'results.json').exists(), 'killed too late to tell'
  process = start(tmp_path, compiled)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert 'of 400, ' in output
  assert final_leaves(tmp_path) == final_leaves(undisturbed)
  assert logged(tmp_path) == logged(undisturbed)


def test_sigterm_saves_says_so_and_exits_without_a_traceback(
  compiled, tmp_path
):
  process = start(tmp_path, compiled)
  wait_for_checkpoint(process, tmp_path)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM, output
  assert 'SIGTERM: saved step' in output
  assert 'Traceback' not in output
  saved = re.search(r'saved step (\d+) of 400', output)[1]
  assert (tmp_path / 'checkpoints' / saved).is_dir()


def test_diverged_run_names_the_step_and_keeps_the_last_good_checkpoint(
  tmp_path,
):
  config = tiny_config(checkpoint={'every': 2, 'keep': 2})
  (run,) = runs.prepare(config, tmp_path)
  running = trainer.Trainer(run)
  update = running.functions.train

  def breaks_at_6(state, batch, step):
    state, values = update(state, batch, step)
    if step == 6:
      values['loss'] = values['loss'] * jnp.nan
    return state, values

  running.functions = dataclasses.replace(running.functions, train=breaks_at_6)
  with pytest.raises(
    NotFiniteError, match='loss is nan at step 6; checkpoint 4 is the'
  ):
    running.run(signals.StopRequest())
  running.close()
  assert sorted(p.name for p in (tmp_path / 'checkpoints').glob('[0-9]*')) == [
    '2',
    '4',
  ]


def test_parameters_that_overflow_are_never_saved(tmp_path):
  # The loss of the last step is finite; the update after it is not.
  config = tiny_config(
    steps=1,
    optimizer={'name': 'sgd', 'learning_rate': 3e38, 'weight_decay': 1e3},
  )
  with pytest.raises(NotFiniteError, match='after step 1; there is no'):
    run_to_end(config, tmp_path)


def one_update(config, batch):
  """Parameters and metrics after one step on `batch`."""
  task_free = runs.resolve_model(
    config.model, runs.tasks.make_task(**config.task)
  )
  graph, _ = steps.abstract_params(task_free)
  state = steps.init_state(task_free, config)
  state, values = steps.make_steps(graph, config).train(state, batch, 1)
  return jax.device_get((state['params'], values))


def test_accumulation_minimises_the_same_loss_as_one_batch():
  config = tiny_config(
    optimizer={'name': 'sgd', 'schedule': 'constant', 'clip_norm': 0.0}
  )
  batches = runs.open_batches(
    config, runs.tasks.make_task(**config.task), 'train'
  )
  batch = next(batches)
  batches.close()
  # Rows of unequal weight: a mean of means would be another loss.
  batch['weights'] = batch['weights'] * np.arange(8)[:, None]
  split = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, accumulation=4)
  )
  whole, in_parts = one_update(config, batch), one_update(split, batch)
  for a, b in zip(
    jax.tree.leaves(whole), jax.tree.leaves(in_parts), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_workdir_written_before_there_was_analysis_continues(tmp_path):
  (run,) = runs.prepare(tiny_config(), tmp_path)
  running = trainer.Trainer(run)
  running.checkpointer.save(
    3,
    **running.state,
    data=running.batches.get_state(),
    meta={'meter': running.meter.state(), 'seconds': 1.0},
  )
  running.close()
  stored = json.loads((tmp_path / 'config.json').read_text())
  del stored['analysis']
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  (tmp_path / 'SHA256SUMS').unlink()
  # Watching more closely is no other run.
  (run,) = runs.prepare(tiny_config(analysis={'dense_every': 5}), tmp_path)
  running = trainer.Trainer(run)
  running.close()
  assert running.step == 3


@pytest.mark.parametrize(
  ('overrides', 'error', 'message'),
  [
    ({'seed': 1}, ValueError, r'another config \(seed: 0 -> 1\)'),
    ({'optimizer': {'b1': 0.8}}, ValueError, r'optimizer.b1: 0.9 -> 0.8'),
    # By its keys, which say more than the shapes of arrays.
    ({'model': {'d_model': 32}}, ValueError, r'model.d_model: 16 -> 32'),
  ],
)
def test_workdir_of_another_run_is_refused(finished, overrides, error, message):
  with pytest.raises(error, match=message):
    runs.prepare(tiny_config(**overrides), finished[0])


def test_named_runs_train_side_by_side_and_are_compared(tmp_path, capsys):
  config = dataclasses.replace(
    tiny_config(steps=4),
    runs={
      'softmax': {'model': {'layers': ('full',)}},
      'elu+1': {'model': {'layers': ('linear',)}},
    },
  )
  results = run_to_end(config, tmp_path)
  assert set(results) == {'softmax', 'elu+1'}
  assert json.loads((tmp_path / 'results.json').read_text()) == results
  assert (tmp_path / 'elu+1' / 'checkpoints' / '4').is_dir()
  assert (tmp_path / 'figures' / 'training.png').stat().st_size > 5000
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split()[:4] == ['run', 'accuracy', 'chance', 'ceiling']
  assert [line.split()[0] for line in lines[1:3]] == ['softmax', 'elu+1']


def test_tensorboard_has_each_number_of_a_list(tmp_path, monkeypatch):
  found = {}

  class Board:
    def __init__(self, *args, **kwargs):
      self.close = lambda: None

    def add_scalar(self, tag, value, step):
      found[tag] = value, step

  monkeypatch.setattr(metrics_log, 'make_summary_writer', lambda: Board)
  log = metrics_log.MetricsLog(tmp_path, start_step=0, tensorboard=True)
  row = {'step': 3, 'split': 'analysis', 'a': 1.5, 'b': [[1.0], [2.0]]}
  log.write({**row, 'c': None, 'd': 'text'})
  log.close()
  assert found == {
    'analysis/a': (1.5, 3),
    'analysis/b/0/0': (1.0, 3),
    'analysis/b/1/0': (2.0, 3),
  }


class BendsAtTwo(phase.PhaseDetector):
  """Sees a bend in step 2, and a change once the score is flat again."""

  def add_accuracy(self, step, accuracy):
    super().add_accuracy(step, accuracy)
    if step == 2:
      self._bends(step)

  def settled(self, step):
    return self.dense(step - 1) and not self.dense(step)


class Counts:
  """An analyzer whose numbers tell the step."""

  def __init__(self, graph, model, task, *, rows, seed, placement):
    assert model.vocab_size == task.vocab_size
    assert (rows, seed, placement) == (8, 0, None)

  def measure(self, params, step):
    return {'score': step / 100, 'heads': [[step, 0.5], [1.0, 2.0]]}

  def ablate(self, params, step):
    return {'drop': [[0.25]]}


def test_bend_makes_a_run_look_closely_and_changes_no_bit_however_it_ends(
  finished, tmp_path, monkeypatch
):
  monkeypatch.setattr(phase, 'PATIENCE', 3)
  monkeypatch.setattr(phase, 'PhaseDetector', BendsAtTwo)
  monkeypatch.setattr(trainer, 'Analyzer', Counts)
  config = tiny_config(
    # No score of so few steps bends of itself.
    analysis={'every': 8, 'dense_every': 1, 'bend': 0.99},
    log={'tensorboard': True},
  )
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  result = run_to_end(config, whole)['']
  steps_of = {split: [] for split in ('validation', 'analysis', 'ablation')}
  for row in logged(whole):
    steps_of.setdefault(row['split'], []).append(row['step'])
  # What step 2 tells is known from step 3 on, and three steps are flat.
  assert steps_of == {
    'train': [4, 8, 12],
    'validation': [3, 4, 5, 6, 12],
    'analysis': [3, 4, 5, 8, 12],
    'ablation': [6, 12],
  }
  (row,) = (
    row
    for row in logged(whole)
    if (row['step'], row['split']) == (8, 'analysis')
  )
  assert row['score'] == 0.08 and row['heads'] == [[8, 0.5], [1.0, 2.0]]
  assert result['analysis_share'] > 0
  assert list((whole / 'tensorboard').glob('events.*'))
  assert final_leaves(whole) == final_leaves(finished[0])
  # Within the dense part: what was seen of the bend is carried over.
  (run,) = runs.prepare(config, stopped)
  running = trainer.Trainer(run)
  with pytest.raises(StoppedError, match='saved step 4 of 12'):
    running.run(StopAt(running, 4))
  running.close()
  run_to_end(config, stopped)
  assert final_leaves(stopped) == final_leaves(whole)
  assert logged(stopped) == logged(whole)


def test_change_of_the_validation_accuracy_is_told_and_drawn(tmp_path):
  rows = [
    {'step': step, 'split': 'validation', 'loss': 1.0, 'accuracy': accuracy}
    for step, accuracy in ((100, 0.1), (200, 0.1), (300, 0.9), (400, 0.9))
  ]
  rows += [
    {**row, 'split': 'train', 'tokens_per_second': rate}
    for row, rate in zip(rows, (100.0, 100.0, 0.0, 100.0), strict=True)
  ]
  rows += [{'step': s, 'split': 'analysis', 'seconds': 5.0} for s in (1, 2)]
  result = results_lib.summary(
    rows,
    {'loss': 1.0, 'accuracy': 0.9},
    task=runs.tasks.make_task(**tiny_config().task),
    steps=400,
    step_tokens=50,
    parameters=1,
    state_bytes=1,
    seconds=1.0,
    seed=0,
  )
  change = result['phase_change']
  assert set(change) == {'step', 'low', 'high', 'before', 'after', 'width'}
  assert (change['low'], change['step'], change['high']) == (200, 250, 300)
  # Two analyses of 5 seconds, 400 steps of half a second each.
  assert result['analysis_share'] == 0.05
  assert result['tokens_per_second'] == 100
  json.dumps(result)
  for name in ('with', 'without'):
    figures.training(tmp_path / f'{name}.png', {'': rows}, results={'': result})
    result = {**result, 'phase_change': None}
  pictures = [(tmp_path / f'{n}.png').read_bytes() for n in ('with', 'without')]
  assert pictures[0] != pictures[1]
