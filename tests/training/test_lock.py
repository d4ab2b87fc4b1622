"""Workdir lock: the second trainer is refused, and a dead one holds nothing."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from longctx.training.errors import LockedError
from longctx.training.lock import locked

HOLD = """
import pathlib, sys, time
from longctx.training.lock import locked
with locked(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE
  )
  assert process.stdout.readline() == b'held\n'
  yield process
  process.kill()
  process.communicate()


def test_the_second_is_refused_with_the_pid_and_host_of_the_first(
  holder, tmp_path
):
  who = f'trained by process {holder.pid} on {socket.gethostname()}'
  with pytest.raises(LockedError, match=who), locked(tmp_path):
    raise AssertionError
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert str(holder.pid) in (tmp_path / 'lock').read_text()
  with locked(tmp_path):
    assert f'process {os.getpid()} on' in (tmp_path / 'lock').read_text()
  assert (tmp_path / 'lock').read_text() == ''


def test_one_process_cannot_train_twice_either(tmp_path):
  with locked(tmp_path), pytest.raises(LockedError), locked(tmp_path):
    raise AssertionError
  with locked(tmp_path):
    pass
