"""eval: a trained folder measured again, and at other lengths."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from longctx import tasks
from longctx.data.pipeline import make_iterator
from longctx.evaluation import sweep
from longctx.training import log_files, metrics, runs, steps, trainer
from tests.tiny import tiny_config


def trained(workdir, **overrides):
  config = tiny_config(steps=4, **overrides)
  results = trainer.train(runs.prepare(config, workdir), workdir)
  return workdir, results['']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return trained(tmp_path_factory.mktemp('trained'))


def run_sweep(workdir, text, **kwargs):
  opened = sweep.open_workdir(workdir)
  return sweep.evaluate(
    opened, workdir, sweep=sweep.parse_sweep(text), **kwargs
  )


def test_task_as_trained_gives_the_accuracy_of_the_training_run(workdir):
  folder, result = workdir
  (row,) = run_sweep(folder, '', batches=2)
  assert row['accuracy'] == pytest.approx(result['accuracy'])
  assert row['loss'] == pytest.approx(result['loss'])
  assert row['low'] <= row['accuracy'] <= row['high']
  assert (row['step'], row['count'], row['examples']) == (4, 32, 16)


def test_sweep_reaches_beyond_the_trained_length_and_is_drawn(workdir):
  folder, _ = workdir
  rows = run_sweep(folder, 'seq_len=16,64', batches=2)
  assert [row['value'] for row in rows] == [16, 64]
  assert (folder / 'figures' / 'seq_len.png').stat().st_size > 5000
  run_sweep(folder, 'seq_len=64', batches=2)
  lines = log_files.read_lines(folder / 'eval.jsonl')
  assert [line['value'] for line in lines if line['parameter']] == [16, 64]


class StoppedHere(Exception):
  pass


def test_a_value_is_written_when_it_is_measured_and_not_measured_again(
  workdir, monkeypatch, capsys
):
  folder, _ = workdir
  measure, calls = sweep._Measure.__call__, []

  def counted(self, task, head):
    if len(calls) == 2:
      raise StoppedHere
    calls.append(head['value'])
    return measure(self, task, head)

  with monkeypatch.context() as patch:
    patch.setattr(sweep._Measure, '__call__', counted)
    with pytest.raises(StoppedHere):
      run_sweep(folder, 'num_pairs=1,2,3', batches=1)
  lines = log_files.read_lines(folder / 'eval.jsonl')
  before = [row for row in lines if row['parameter'] == 'num_pairs']
  assert [row['value'] for row in before] == calls == [1, 2]
  capsys.readouterr()
  rows = run_sweep(folder, 'num_pairs=1,2,3', batches=1)
  assert rows[:2] == before
  assert capsys.readouterr().err.count('as measured before') == 2
  # More batches are another measurement.
  run_sweep(folder, 'num_pairs=1', batches=2)
  assert 'as measured before' not in capsys.readouterr().err


def test_a_damaged_line_is_measured_again(workdir, capsys):
  folder, _ = workdir
  rows = run_sweep(folder, 'num_pairs=2,3', batches=1)
  path = folder / 'eval.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  lines[-1] = lines[-1].replace(b'0', b'1', 1)
  path.write_bytes(b''.join(lines))
  assert run_sweep(folder, 'num_pairs=2,3', batches=1) == rows
  assert f'{path}: line {len(lines)} is damaged' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['', '{"seed": ', '[]'])
def test_a_damaged_config_is_one_line_that_says_what_to_do(
  workdir, tmp_path, text
):
  path = shutil.copytree(workdir[0], tmp_path / 'copy') / 'config.json'
  path.write_text(text)
  with pytest.raises(
    ValueError, match=r"run train\.py's command again"
  ) as error:
    sweep.open_workdir(path.parent)
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def weights_at(T, *rows):
  weights = np.zeros((len(rows), T), np.float32)
  for row, places in enumerate(rows):
    weights[row, list(places)] = 0.5
  return {'weights': weights}


@pytest.mark.parametrize(
  ('rows', 'indices'),
  [
    ([[3], [7]], [[3], [7]]),
    ([[3, 40, 41], [7]], [[3, 40, 41, -1], [7, -1, -1, -1]]),
    ([[], [0, 63]], [[-1, -1], [0, 63]]),
    ([[], []], [[-1], [-1]]),
    ([range(8), [1]], [range(8), [1, *[-1] * 7]]),
  ],
)
def test_scored_places_are_read_where_they_are_few(rows, indices):
  np.testing.assert_array_equal(
    steps.with_query_indices(weights_at(64, *rows))['query_indices'],
    [list(r) for r in indices],
  )


def test_many_scored_places_leave_the_batch_as_it_was():
  batch = weights_at(64, range(9), [])
  assert steps.with_query_indices(batch) is batch


def test_measuring_at_the_scored_places_gives_the_same_sums():
  task = tasks.make_task('passkey', seq_len=64)
  config = tiny_config(model={'layers': ('linear', 'scalable_softmax')})
  config = dataclasses.replace(
    config, task=tasks.task_defaults('passkey', seq_len=64)
  )
  model = runs.resolve_model(config.model, task)
  graph, _ = steps.abstract_params(model)
  params = steps.init_state(model, config)['params']
  measure = steps.make_steps(graph, config).evaluate
  batches = make_iterator(task, split='test', batch_size=4, seed=0)
  batch = next(batches)
  batches.close()
  few = steps.with_query_indices(batch)
  assert few['query_indices'].shape == (4, 8)
  actual, expected = measure(params, few), measure(params, batch)
  assert expected['weight'] == 20
  for key, value in expected.items():
    np.testing.assert_allclose(actual[key], value, rtol=1e-5)


def test_learned_positions_refuse_a_longer_sequence(tmp_path):
  folder, _ = trained(tmp_path, model={'position_encoding': 'learned'})
  (run,) = sweep.open_workdir(folder)
  sweep.swept_tasks(run, sweep.parse_sweep('seq_len=8,16'))
  with pytest.raises(ValueError, match=r'17 .*max_positions') as error:
    sweep.swept_tasks(run, sweep.parse_sweep('seq_len=17'))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('seq_len', 'must be like'),
    ('seq_len=', 'must be like'),
    ('length=3', 'did you mean seq_len'),
    ('seq_len=4', 'too short for num_pairs=2'),
    ('seq_len=abc', "seq_len='abc' must be an integer"),
    ('vocab_size=32', 'needs 32 tokens, and the model knows 16'),
    ('name=copying', 'a field of the task'),
  ],
)
def test_wrong_sweep_is_refused(workdir, text, message):
  (run,) = sweep.open_workdir(workdir[0])
  with pytest.raises(ValueError, match=message):
    sweep.swept_tasks(run, sweep.parse_sweep(text))


def test_folder_without_a_run_or_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no workdir of train\.py'):
    sweep.open_workdir(tmp_path)
  runs.prepare(tiny_config(), tmp_path)
  with pytest.raises(ValueError, match=r'no checkpoint in .*: train it first'):
    sweep.open_workdir(tmp_path)


def test_interval_covers_the_truth_where_tokens_of_an_example_agree():
  # Every example is all right or all wrong: 16 tokens are one piece of news.
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(400):
    right = rng.random((20, 8)) < 0.7
    correct = 16.0 * right.sum(axis=1)
    weight = np.full(20, 16.0 * 8)
    low, high = metrics.accuracy_interval(correct, weight, examples=160)
    covered += low <= 0.7 <= high
  assert 0.92 <= covered / 400 <= 0.99


def test_interval_of_a_perfect_score_counts_examples_not_tokens():
  weight = np.full(4, 1000.0)
  low, high = metrics.accuracy_interval(weight, weight, examples=20)
  assert high == pytest.approx(1.0)
  assert low == pytest.approx(20 / (20 + 1.96**2), rel=1e-6)


def test_line_cut_short_by_a_kill_is_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps({'step': 1}) + '\n{"step": 2, "lo')
  assert log_files.read_lines(path) == [{'step': 1}]
