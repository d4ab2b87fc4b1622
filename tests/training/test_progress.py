"""Long work says what it does and for how long, and leaves no thread."""

import dataclasses
import io
import re
import threading
import time
import types

import pytest

from longctx.training import (
  metrics,
  progress,
  runs,
  signals,
  step_cost,
  trainer,
)
from tests.tiny import tiny_config


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(progress, 'REFRESH', 0.01)
  monkeypatch.setattr(progress, 'LINES', 0.02)


def wait_for(text, stream, seconds=20):
  end = time.monotonic() + seconds
  while not re.search(text, stream.getvalue()):
    assert time.monotonic() < end, stream.getvalue()[-500:]
    time.sleep(0.005)


def stream_of(kind):
  @pytest.fixture
  def stream(monkeypatch):
    # Not sys.stderr itself, which pytest puts back before the test.
    stream = kind()
    for module in (metrics, progress):
      monkeypatch.setattr(module, 'sys', types.SimpleNamespace(stderr=stream))
    return stream

  return stream


plain, terminal = stream_of(io.StringIO), stream_of(Terminal)


def test_without_a_terminal_lines_tell_what_is_done(fast, plain):
  before = threading.active_count()
  with progress.Progress('train', 10, start=2) as bar:
    with bar.doing('compiling'):
      wait_for(r'train: step 2/10  compiling \d+ s\n', plain)
    with bar.doing('first step', 1320.0):
      wait_for(r'step 2/10  first step \d+ s of about 22 min\n', plain)
    bar.advance(figures='loss 1.5')
    wait_for('train: step 3/10  loss 1.5', plain)
    # A step that takes long has a heartbeat of its own.
    wait_for(r'loss 1.5, this step \d+ s\n', plain)
  assert threading.active_count() == before
  assert '\r' not in plain.getvalue() and '\x1b' not in plain.getvalue()


def test_lines_come_by_time_and_the_last_figures_at_the_end(plain):
  with progress.Progress('train', 1000) as bar:
    for index in range(1000):
      bar.advance(figures=f'loss {index}')
  assert plain.getvalue() == 'train: step 1,000/1,000  loss 999\n'


def test_a_bar_tells_the_same_and_its_thread_ends(fast, terminal):
  before = {*threading.enumerate()}
  with progress.Progress('train', 10) as bar:
    with bar.doing('compiling'):
      wait_for(r'compiling \d+ s', terminal)
    bar.advance(figures='loss 1.5')
    wait_for('1/10', terminal)
    wait_for('loss 1.5', terminal)
  assert {*threading.enumerate()} == before


def test_other_processes_are_silent_and_have_no_thread(
  fast, terminal, monkeypatch
):
  monkeypatch.setattr(metrics, 'is_writer', lambda: False)
  before = threading.active_count()
  with progress.Progress('train', 10) as bar, bar.doing('compiling', done='in'):
    assert threading.active_count() == before
    time.sleep(0.05)
  assert terminal.getvalue() == ''


def test_thread_ends_when_the_work_fails(fast, plain):
  before = threading.active_count()
  with (
    pytest.raises(ZeroDivisionError),
    progress.Progress('train', 10) as bar,
    bar.doing('compiling'),
  ):
    _ = 1 / 0
  assert threading.active_count() == before


def test_run_tells_compiling_first_step_evaluating_and_saving(
  fast, plain, monkeypatch, tmp_path
):
  config = tiny_config(steps=3, log={'every': 1})
  (run,) = runs.prepare(config, tmp_path)
  made = trainer.Trainer(run)
  tokens = f'{config.batch_size * made.task.seq_len:,}'
  # Each part lasts until the run has told of it.
  slow = lambda text, f: lambda *args: (wait_for(text, plain), f(*args))[1]
  update, ready = made.functions.train, trainer.jax.block_until_ready
  made.functions = dataclasses.replace(
    made.functions, train=slow('compiling', update)
  )
  monkeypatch.setattr(
    trainer.jax, 'block_until_ready', slow(r'first step \d+ s of about', ready)
  )
  monkeypatch.setattr(made, '_validate', slow('evaluating', made._validate))
  monkeypatch.setattr(made, 'save', slow('saving', made.save))
  monkeypatch.setattr(step_cost, 'LONG_FLOPS', 1.0)
  monkeypatch.setattr(step_cost, 'LINES', 0.0)
  monkeypatch.setattr(
    step_cost, 'matmul_rate', lambda dtype: made._flops() / 1320
  )
  made.run(signals.StopRequest())
  made.close()
  said = plain.getvalue()
  assert f'a step reads {tokens} tokens in an estimated 22 min' in said
  assert 'train: step 3/3  loss ' in said


def test_rate_of_matrix_products_is_measured():
  assert 1e8 < progress.matmul_rate('float32') < 1e16


@pytest.mark.parametrize(
  ('seconds', 'text'), [(3.0, '3 s'), (1320.0, '22 min'), (9000.0, '2.5 h')]
)
def test_span_is_read_at_a_glance(seconds, text):
  assert progress.span(seconds) == text
