"""What would fail after compiling, or mislead, is told beforehand."""

import pytest

from longctx import masks, tasks
from longctx.training import checks, runs
from tests.tiny import tiny_config


@pytest.mark.parametrize(
  ('name', 'fields', 'asks'),
  [
    ('bytes_lm', {'seq_len': 64}, True),
    ('copying', {'seq_len': 40}, True),
    ('markov', {}, True),
    ('passkey', {}, True),
    ('mqar', {}, False),
    ('selective_copying', {'seq_len': 64, 'num_kept': 8}, False),
    ('variable_tracking', {}, False),
  ],
)
def test_task_is_asked_for_the_next_token_where_labels_follow(
  name, fields, asks
):
  task = tasks.make_task(name, **fields)
  assert checks.asks_for_next(task, seed=0) == asks


@pytest.mark.parametrize(
  ('mask', 'reads'),
  [
    (masks.Causal(), False),
    (masks.SlidingWindow(3), False),
    (masks.SlidingWindow(3, 1), True),
    (masks.Full(), True),
    (masks.GlobalTokens(2), True),
    # Not known to be causal, and causal all the same.
    (masks.BlockSparse(1, ((1, 0), (1, 1))), False),
    (masks.BlockSparse(4, ((1, 0), (1, 1))), True),
    (None, False),
  ],
)
def test_mask_reads_later_tokens_by_its_pairs(mask, reads):
  assert checks.reads_later(mask, 20) == reads


def test_layer_that_reads_what_it_is_asked_for_is_said_in_a_line(
  tmp_path, capsys
):
  layers = ('full', 'longformer(window=4, causal=False)')
  copying = {'name': 'copying', 'seq_len': 20, 'num_symbols': 4}
  config = tiny_config(model={'layers': layers}, task=copying)
  runs.prepare(config, tmp_path / 'a')
  lines = capsys.readouterr().err.splitlines()
  lines = [line for line in lines if line.startswith('warning: ')]
  (line,) = lines
  assert "'longformer(window=4, causal=False)' reads later tokens" in line
  assert 'copying asks for the next ones' in line
  # Its labels are nowhere behind the question.
  runs.prepare(tiny_config(model={'layers': layers}), tmp_path / 'b')
  assert 'warning' not in capsys.readouterr().err


@pytest.mark.parametrize(
  'changes',
  [
    {'model': {'mlp_dim': 2**31 - 1, 'd_model': 2**20, 'num_heads': 2**10}},
    {'model': {'vocab_size': 2**31 - 1, 'd_model': 4096}},
    {'batch_size': 2**30},
    {'eval': {'batch_size': 2**31 - 1}},
    {'eval': {'batches': 2**31 - 1}},
  ],
)
def test_run_that_no_memory_holds_is_refused(changes, tmp_path):
  with pytest.raises(ValueError, match=r'the run holds .* GB at least'):
    runs.prepare(tiny_config(**changes), tmp_path)


def test_rows_that_do_not_divide_by_the_mesh_are_refused():
  with pytest.raises(ValueError, match=r'eval.batch_size=3 .*: 2 or 4'):
    tiny_config(parallel={'data': 2}, eval={'batch_size': 3})
  with pytest.raises(ValueError, match=r'batch_size=9 .*parallel.data=2: 8 or'):
    tiny_config(parallel={'data': 2}, batch_size=9)
