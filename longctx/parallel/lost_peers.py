"""Log filter: a lost process in one line, in place of C++'s pages.

Runs as a process of its own, without the package, which reads what the C++ of
another one writes to its standard error and passes it on. That one is ended in
the middle of what it does, and has no time to say anything itself.
"""

import os
import re
import select

# Begins the line by which the other process introduces itself and all hosts.
HOSTS = '\0longctx '

# Seconds after which the coordination service has complained for nothing.
PATIENCE = 5.0

LOG = r'[WEF]\d{4} \S+ +\d+ '
COMPLAINT = re.compile(
  LOG + r'((coordination_service|preemption)\w*\.cc|client\.h):'
)
# No complaint: what the signal does is said elsewhere.
SIGTERM = re.compile(LOG + r'preemption_notifier\.cc:\d+\] SIGTERM caught')
FATAL = 'the JAX distributed service detected fatal errors'


def describe(log: str, me: int, hosts: list[str]) -> str:
  """What has happened, by the log of a process that was ended.

  Args:
    log: its last lines.
    me: which process it was.
    hosts: of all processes.
  """
  if not hosts:
    return (
      'error: the processes did not come together in time: start all of them, '
      'with one --coordinator, one --num_processes and a --process_id for each'
    )
  found = re.findall(r'heartbeats\):\n([\d\n]+)|Task (\d+) heartbeat', log)
  lost = sorted(
    {int(i) for pair in found for part in pair for i in part.split()}
  )
  # The first one runs the service: without it nobody answers.
  lost = lost or ([0] if 'received from peer' in log else [])
  if me in lost:
    return (
      f'error: process {me} ({hosts[me]}) gave no sign of life for so long '
      'that the others counted it as lost; the same commands continue'
    )
  names = ', '.join(f'process {i} ({hosts[i]})' for i in lost)
  return (
    f'error: lost {names or "another process"} of {len(hosts)}; the same '
    'commands, in every process, continue from the last checkpoint'
  )


def main() -> None:
  """Passes lines on until the other process has ended."""
  me, hosts, held, rest = 0, [], [], b''
  while True:
    if not select.select([0], [], [], PATIENCE if held else None)[0]:
      _write(held)
      held = []
      continue
    chunk = os.read(0, 2**16)
    if not chunk:
      break
    *lines, rest = (rest + chunk).split(b'\n')
    for line in lines:
      text = line.decode(errors='replace')
      if text.startswith(HOSTS):
        index, *hosts = text.removeprefix(HOSTS).split()
        me = int(index)
      elif SIGTERM.match(text):
        continue
      elif held or COMPLAINT.match(text):
        held.append(line)
      else:
        _write([line])
  log = b'\n'.join([*held, rest]).decode(errors='replace')
  if FATAL in log:
    held, rest = [describe(log, me, hosts).encode()], b''
  _write(held + [rest] * bool(rest))


def _write(lines: list[bytes]) -> None:
  os.write(1, b''.join(line + b'\n' for line in lines))


if __name__ == '__main__':
  main()
