"""The pipeline: one order for any start, worker, process, or storage."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from longctx.cli import flags
from longctx.data.pipeline import make_iterator
from longctx.tasks import make_task

ROOT = pathlib.Path(__file__).parents[2]
TASK = make_task('mqar', num_pairs=2, seq_len=16, vocab_size=32)


def batches(task=TASK, **kwargs):
  kwargs = dict(split='train', batch_size=8, seed=0) | kwargs
  return make_iterator(task, **kwargs)


def take(iterator, number):
  try:
    return [next(iterator) for _ in range(number)]
  finally:
    iterator.close()


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


def test_row_of_a_batch_is_its_example():
  for b, batch in enumerate(take(batches(split='test', seed=3), 3)):
    for row in range(8):
      example = TASK.get(3, 'test', b * 8 + row).arrays()
      assert_equal([{k: v[row] for k, v in batch.items()}], [example])


@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_rows_do_not_depend_on_the_number_of_processes(process_count):
  parts = [
    take(batches(process_index=p, process_count=process_count), 3)
    for p in range(process_count)
  ]
  joined = [
    {k: np.concatenate([part[k] for part in step]) for k in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, take(batches(), 3))


@pytest.mark.parametrize('position', [0, 1, 5])
def test_saved_position_resumes_exactly(position):
  whole = take(batches(), 8)
  first = batches()
  assert_equal([next(first) for _ in range(position)], whole[:position])
  state = json.loads(json.dumps(first.get_state()))
  first.close()
  second = batches()
  next(second)
  second.set_state(state)
  assert_equal(take(second, 8 - position), whole[position:])


def test_start_skips_batches():
  assert_equal(take(batches(start=3), 2), take(batches(), 5)[3:])


def test_workers_keep_the_order_and_the_position():
  whole = take(batches(), 6)
  iterator = batches(workers=2)
  try:
    assert_equal([next(iterator) for _ in range(3)], whole[:3])
    state = iterator.get_state()
  finally:
    iterator.close()
  # Saved with two workers, continued with none.
  iterator = batches()
  iterator.set_state(state)
  assert_equal(take(iterator, 3), whole[3:])


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (dict(seed=1), 'seed=0, and this run has seed=1'),
    (dict(batch_size=16), 'batch_size=8, and this run has batch_size=16'),
    (dict(split='test'), "split='train'"),
    (dict(task=make_task('mqar')), 'task.seq_len=16, and this run has'),
  ],
)
def test_position_in_other_data_is_refused(other, message):
  state = batches().get_state()
  with pytest.raises(ValueError, match=message):
    batches(**other).set_state(state)


def test_finite_iterator_pads_its_last_batch_with_weight_zero():
  finite = list(batches(num_examples=20))
  endless = take(batches(), 3)
  assert_equal(finite[:2], endless[:2])
  assert len(finite) == 3
  last = finite[2]
  assert_equal(
    [{k: v[:4] for k, v in last.items()}],
    [{k: v[:4] for k, v in endless[2].items()}],
  )
  assert last['tokens'].shape == (8, 16)
  assert not last['weights'][4:].any()


def test_finite_iterator_ends_together_on_all_processes():
  parts = [
    list(batches(num_examples=9, process_index=p, process_count=4))
    for p in range(4)
  ]
  assert [len(part) for part in parts] == [2] * 4
  weight = sum(batch['weights'].sum() for part in parts for batch in part)
  assert weight == 9 * TASK.num_pairs


def test_packed_documents_keep_their_segment_ids(tmp_path):
  path = tmp_path / 'text'
  path.write_bytes(b'some text ' * 500)
  task = make_task('bytes_lm', path=str(path), seq_len=20, packed=True)
  (batch,) = take(batches(task), 1)
  assert batch['segment_ids'].shape == (8, 20)
  assert batch['segment_ids'].dtype == np.int32


def test_relevant_tokens_stay_with_their_example():
  task = make_task('variable_tracking')
  (batch,) = take(batches(task), 1)
  assert batch['relevant'].dtype == bool
  expected = [task.get(0, 'train', row).relevant for row in range(8)]
  np.testing.assert_array_equal(batch['relevant'], expected)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(batch_size=6, process_count=4), 'multiple of process_count=4'),
    (dict(batch_size=0), 'batch_size=0'),
    (dict(process_index=1), r'process_index=1 must be in \[0, 1\)'),
    (dict(start=-1), 'must not be negative'),
    (dict(workers=-1), 'must not be negative'),
    (dict(num_examples=0), 'at least 1'),
    (dict(split='valid'), 'known: train, validation, test'),
    (dict(seed=-1), 'must not be negative'),
  ],
)
def test_bad_argument_is_an_error(kwargs, message):
  with pytest.raises(ValueError, match=message):
    batches(**kwargs)


def command(directory, *arguments):
  try:
    flags.run('data', ['prepare', f'--data_dir={directory}', *arguments])
  except SystemExit as stop:
    return stop.code
  return 0


def test_command_prepares_a_task_with_its_fields(tmp_path, capsys):
  fields = ('--task.num_pairs=2', '--task.seq_len=16', '--task.vocab_size=32')
  sizes = ('--num_train=24', '--num_test=8')
  assert command(tmp_path, '--task=mqar', *fields, *sizes, '--seed=5') == 0
  assert str(tmp_path) in capsys.readouterr().out
  prepared = batches(seed=5, directory=str(tmp_path))
  assert_equal(take(prepared, 3), take(batches(seed=5), 3))


CONFIG = """
from ml_collections import ConfigDict
def get_config(pairs='4'):
  return ConfigDict(dict(
    seed=2, steps=3, batch_size=8, runs={},
    task=dict(name='mqar', num_pairs=int(pairs), seq_len=16, vocab_size=32),
    eval=dict(batches=2, batch_size=0, test_batches=1)))
"""


def test_command_prepares_what_a_config_reads(tmp_path, capsys):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  override = '--config.task.num_pairs=2'
  assert command(tmp_path, f'--config={path}:3', override) == 0, capsys
  directory = str(tmp_path)
  prepared = batches(seed=2, directory=directory)
  assert_equal(take(prepared, 3), take(batches(seed=2), 3))
  held_out = dict(seed=2, split='validation')
  assert_equal(
    list(batches(**held_out, directory=directory, num_examples=16)),
    take(batches(**held_out), 2),
  )
  assert command(tmp_path, f'--config={path}', '--config.task.pairs=2') == 2
  assert command(tmp_path, f'--config={path}', '--config.seed=x') == 2
  assert capsys.readouterr().err.count('\n') == 2


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--task=mqar', '--task.num_pair=2'], 'did you mean num_pairs'),
    (['--task=mqar', '--task.num_pairs=x'], 'must be an integer'),
    (['--task=mqar', '--num_pairs=2'], 'unknown flag --num_pairs=2'),
    (['--task=nope', '--num_train=1'], "unknown task 'nope'"),
    (['--task=mqar'], 'nothing to prepare'),
    (['--config=/no/such/config.py'], 'there is no such config file'),
    ([], 'give either --config=FILE or --task=NAME'),
  ],
)
def test_bad_command_ends_with_one_line_and_status_2(
  arguments, message, tmp_path, capsys
):
  assert command(tmp_path, *arguments) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1


READS = """
import os, sys, time
from longctx.data.pipeline import make_iterator
from longctx.tasks import make_task

if __name__ == '__main__':
  batches = make_iterator(
    make_task('mqar'), split='train', batch_size=4, seed=0, workers=2
  )
  next(batches)
  print('reads', flush=True)
  try:
    while True:
      time.sleep(0.1)
      next(batches)
  except KeyboardInterrupt:
    batches.close()
"""


def reading(folder):
  """A process group that reads by two workers, and its processes."""
  path = folder / 'reads.py'
  path.write_text(READS)
  process = subprocess.Popen(
    [sys.executable, str(path)],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  assert process.stdout.readline() == b'reads\n'
  return process


def group(leader):
  """Which processes of its group are alive."""
  found = subprocess.run(
    ['ps', '-eo', 'pgid=,pid=,stat='],
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  rows = [line.split() for line in found.splitlines()]
  return [
    int(pid)
    for pgid, pid, state in rows
    if int(pgid) == leader and state[0] != 'Z'
  ]


@pytest.mark.slow
def test_workers_die_with_a_run_that_is_killed(tmp_path):
  process = reading(tmp_path)
  # Two workers, and what counts their shared memory.
  assert len(group(process.pid)) >= 3
  process.kill()
  process.communicate()
  end = time.monotonic() + 20
  while group(process.pid) and time.monotonic() < end:
    time.sleep(0.1)
  assert group(process.pid) == []


@pytest.mark.slow
def test_workers_are_silent_where_a_terminal_interrupts(tmp_path):
  process = reading(tmp_path)
  os.killpg(process.pid, signal.SIGINT)
  assert process.communicate(timeout=60)[1] == b''
  assert process.returncode == 0
