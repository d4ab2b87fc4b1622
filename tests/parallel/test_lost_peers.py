"""A lost process is one line, whatever the C++ of another one writes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from longctx.parallel import lost_peers

# As XLA wrote them, shortened.
TRACE = """*** Check failure stack trace: ***
    @     0x7f11efe40634  absl::lts_20260107::log_internal::LogMessage::Flush()
"""
ENDING = (
  'F1130 17:13:33.734114 15029 client.h:80] Terminating process because the '
  'JAX distributed service detected fatal errors. '
)
SOCKET_CLOSED = f"""\
E1130 17:13:20.936191 14695 coordination_service_agent.cc:289] Polled an error
{ENDING}absl::Status: UNAVAILABLE: Socket closed
:UNKNOWN:Error received from peer  {{grpc_message:"Socket closed"}}
{TRACE}"""
SILENT = f"""\
E1130 17:13:33.733518 15018 coordination_service.cc:1549] Use error polling to \
propagate the following error to all tasks: UNAVAILABLE: The following tasks \
are unhealthy (stopped sending heartbeats):
1
3
The tasks have crashed.
{ENDING}
{TRACE}"""
FAILED_BARRIER = f"""\
E1130 17:10:06.767650 3062 coordination_service.cc:1520] Shutdown barrier has \
failed: UNAVAILABLE: Task 2 heartbeat timeout.
{ENDING}
{TRACE}"""
HOSTS = ['a', 'b', 'c', 'd']


@pytest.mark.parametrize(
  ('log', 'me', 'message'),
  [
    (SOCKET_CLOSED, 1, 'lost process 0 (a) of 4; '),
    (SILENT, 0, 'lost process 1 (b), process 3 (d) of 4; '),
    (FAILED_BARRIER, 0, 'lost process 2 (c) of 4; '),
    (SILENT, 3, 'process 3 (d) gave no sign of life'),
    (ENDING, 0, 'lost another process of 4; '),
  ],
)
def test_the_line_names_the_lost_process_and_its_host(log, me, message):
  line = lost_peers.describe(log, me, HOSTS)
  assert message in line
  assert '\n' not in line


def filtered(*texts, after=0.0):
  """What comes out of the filter."""
  process = subprocess.Popen(
    [sys.executable, '-I', '-S', lost_peers.__file__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  for text in texts:
    os.write(process.stdin.fileno(), text.encode())
    time.sleep(after)
  return process.communicate(timeout=30)[0].decode()


NAMES = f'{lost_peers.HOSTS}1 a b c d\n'


def test_what_is_no_end_passes_through():
  text = 'W1130 17:13:08.748970 14336 cpu_client.cc:1] slow\nhalf a line'
  assert filtered(NAMES, text[:9], text[9:]) == f'{text}\n'


def test_a_page_of_log_becomes_one_line():
  assert filtered(NAMES, 'before\n', SOCKET_CLOSED) == (
    'before\nerror: lost process 0 (a) of 4; the same commands, in every '
    'process, continue from the last checkpoint\n'
  )


def test_who_does_not_come_is_told_of_before_anyone_has_a_name():
  assert filtered(SOCKET_CLOSED).startswith('error: the processes did not come')


def test_a_complaint_without_an_end_is_shown():
  complaint = SILENT.splitlines(keepends=True)[0]
  assert filtered(NAMES, complaint) == complaint


def test_a_process_that_is_ended_says_so_through_its_filter():
  # The real thing: C++ writes on, and dies of SIGABRT.
  code = f"""
import os, signal, sys
from longctx.parallel import processes
processes._filter_log()
os.write(2, {NAMES.encode()!r})
print('spoken', file=sys.stderr)
os.write(2, {SOCKET_CLOSED.encode()!r})
os.abort()
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, timeout=120, check=False
  )
  assert done.returncode == -signal.SIGABRT
  lines = done.stderr.decode().splitlines()
  assert lines[0] == 'spoken'
  assert lines[1].startswith('error: lost process 0 (a) of 4; ')
  assert len(lines) == 2
