"""Resumption: what moves a parameter is compared, what may change is said."""

import shutil

import jax
import numpy as np
import pytest

from longctx.evaluation import sweep
from longctx.training import runs, trainer
from longctx.training.errors import CheckpointError
from longctx.training.resumption import check_same_run
from tests.tiny import tiny_config


def compare(old, new, step=12):
  return check_same_run(
    tiny_config(**old), tiny_config(**new), step=step, where='runs/x'
  )


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
def test_more_steps_do_not_change_a_schedule_in_silence(schedule):
  old = {'optimizer': {'schedule': schedule}}
  with pytest.raises(ValueError, match='schedule_steps=12 keeps the schedule'):
    compare(old, {**old, 'steps': 24})
  kept = {'optimizer': {'schedule': schedule, 'schedule_steps': 12}}
  assert compare(old, {**kept, 'steps': 24}) == 'steps: 12 -> 24'
  assert compare(kept, {**kept, 'steps': 24}) == 'steps: 12 -> 24'
  with pytest.raises(ValueError, match='schedule_steps: 12 -> 24'):
    compare(kept, {'optimizer': {'schedule': schedule}, 'steps': 24})


@pytest.mark.parametrize(
  'optimizer', [{'schedule': 'constant'}, {'schedule': 'step', 'step_at': 3}]
)
def test_schedules_that_do_not_end_may_go_on(optimizer):
  old = {'optimizer': optimizer}
  assert compare(old, {**old, 'steps': 24}) == 'steps: 12 -> 24'


def test_a_run_is_not_taken_back():
  old = {'optimizer': {'schedule': 'constant'}}
  with pytest.raises(ValueError, match='at step 12, which is beyond steps=11'):
    compare(old, {**old, 'steps': 11})
  assert compare(old, {**old, 'steps': 11}, step=11) == 'steps: 12 -> 11'
  # More than the end of its schedule is in the way.
  with pytest.raises(ValueError, match='beyond steps=11'):
    compare({}, {'steps': 11})


def test_all_that_differs_is_told():
  new = {'seed': 1, 'batch_size': 4, 'optimizer': {'b1': 0.5, 'eps': 1e-6}}
  with pytest.raises(ValueError, match=r'batch_size: .*b1: .*eps: .*seed: 0'):
    compare({}, {**new, 'model': {'d_model': 32}})


def test_what_may_change_is_told_apart_by_what_it_does():
  assert compare({}, {'log': {'every': 3}}) == 'log.every: 4 -> 3'
  said = compare({}, {'log': {'every': 3}, 'model': {'remat': 'full'}})
  assert said.startswith('log.every: 4 -> 3; model.remat: ')
  assert said.endswith('(the same up to the order of sums)')


def test_a_schedule_has_a_length_of_its_own():
  config = tiny_config(optimizer={'schedule_steps': 6}).optimizer
  short, long = (trainer.make_schedule(config, steps) for steps in (6, 60))
  assert [short(t) for t in range(20)] == [long(t) for t in range(20)]
  assert long(6) == long(19) == pytest.approx(1e-4)


def parameters(workdir):
  run = sweep.choose(sweep.open_workdir(workdir), '')
  return jax.tree.leaves(sweep.restore(run).params)


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
  """A run's parameters, and a workdir that holds its first half."""
  folder = tmp_path_factory.mktemp('halves')
  for name, steps in (('whole', 6), ('half', 3)):
    config = tiny_config(steps=steps, optimizer={'schedule_steps': 6})
    trainer.train(runs.prepare(config, folder / name), folder / name)
  return parameters(folder / 'whole'), folder / 'half'


@pytest.mark.parametrize(
  ('change', 'exact'),
  [
    ({}, True),
    ({'eval': {'every': 1, 'batches': 1, 'batch_size': 2}}, True),
    ({'checkpoint': {'every': 1, 'keep': 3}, 'log': {'every': 1}}, True),
    ({'analysis': {'every': 2, 'dense_every': 1, 'rows': 2}}, True),
    ({'model': {'remat': 'full'}}, False),
    ({'model': {'logits_chunk': 4}}, False),
    ({'model': {'implementation': 'reference'}}, False),
    ({'parallel': {'data': 2}}, False),
    ({'parallel': {'seq': 2, 'layout': 'striped'}}, False),
    ({'parallel': {'model': 2, 'data': 2, 'fsdp': True}}, False),
  ],
)
def test_what_may_change_moves_no_parameter(halves, tmp_path, change, exact):
  whole, half = halves
  workdir = shutil.copytree(half, tmp_path / 'half')
  config = {'steps': 6, 'optimizer': {'schedule_steps': 6}, **change}
  trainer.train(runs.prepare(tiny_config(**config), workdir), workdir)
  for a, b in zip(parameters(workdir), whole, strict=True):
    if exact:
      np.testing.assert_array_equal(a, b)
    else:
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def stopped_text_run(folder, text):
  """A run of two steps on a text file."""
  path = folder / 'text.txt'
  path.write_bytes(text)
  return tiny_config(
    steps=2,
    batch_size=2,
    task={'name': 'bytes_lm', 'path': str(path), 'seq_len': 8},
    optimizer={'schedule': 'constant'},
  )


def test_a_text_that_changed_is_refused(tmp_path):
  config = stopped_text_run(tmp_path, b'one two three ' * 30)
  workdir = tmp_path / 'run'
  trainer.train(runs.prepare(config, workdir), workdir)
  # In a process of its own it would be read anew.
  for cached in (
    runs.tasks.bytes_lm.load_text,
    runs.tasks.bytes_lm.digest_text,
  ):
    cached.cache_clear()
  config = stopped_text_run(tmp_path, b'one two three,' * 30)
  with pytest.raises(ValueError, match='text of the task has changed'):
    runs.prepare(config, workdir)


def named(*names):
  layers = {'a': ('full',), 'b': ('linear',)}
  model = {name: {'model': {'layers': layers[name]}} for name in names}
  return runs.dataclasses.replace(tiny_config(steps=1), runs=model)


def test_runs_that_a_config_drops_are_named(tmp_path):
  both = named('a', 'b')
  trainer.train(runs.prepare(both, tmp_path), tmp_path)
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(ValueError, match=r'does not name \(b\)'):
    runs.prepare(named('a'), tmp_path)
  with pytest.raises(ValueError, match=r'does not name \(a, b\)'):
    runs.prepare(tiny_config(steps=1), tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before


def test_what_checkpoints_tell_is_compared_where_config_json_is_damaged(
  tmp_path, capsys
):
  config = tiny_config(steps=1)
  trainer.train(runs.prepare(config, tmp_path), tmp_path)
  path = tmp_path / 'config.json'
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'"seed": 0', b'"seed": 1'))
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    runs.prepare(tiny_config(steps=1, seed=1), tmp_path)
  assert f'{path} is not what was written' in capsys.readouterr().err
  runs.prepare(config, tmp_path)
  assert path.read_bytes() == whole


def test_checkpoints_without_a_readable_record_are_an_error(tmp_path):
  config = tiny_config(steps=1)
  trainer.train(runs.prepare(config, tmp_path), tmp_path)
  for path in (tmp_path / 'checkpoints' / '1' / 'meta').iterdir():
    path.write_bytes(b'')
  prepared = runs.prepare(config, tmp_path)
  with pytest.raises(CheckpointError, match='every checkpoint'):
    trainer.train(prepared, tmp_path)
