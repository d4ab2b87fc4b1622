"""Several processes that train together: how they join, and how they part.

JAX's coordination service, which the first process runs, knows when another one
stops giving signs of life, and then ends all the others from C++, by a page of
log. `lost_peers`, a process beside each, makes one line of that page. The same
service lets all agree on when to stop.
"""

import atexit
import contextlib
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed
from jax._src.lib import _jax

from longctx.parallel import lost_peers

# Seconds without a sign of life until a process counts as lost; it takes up to
# half as long again until the others know.
HEARTBEAT = 30

# Seconds that all may take to check what they read.
PATIENCE = 3600

# Seconds that a process which fails gives the others to fail likewise.
FAREWELL = 10

_joining = threading.Event()
_agreements: list[_jax.PreemptionSyncManager] = []


def join_processes(
  coordinator: str, num_processes: int | None, process_id: int | None
) -> None:
  """Makes this process one of several that train together.

  Has to run before anything uses a device.

  Args:
    coordinator: 'host:port' of the first process; 'auto' where the cluster
      tells (TPU pods, Slurm, Open MPI, Kubernetes).
    num_processes: how many there are; None with 'auto'.
    process_id: which one this is, from 0; None with 'auto'.

  Raises:
    ValueError: the three do not fit together, or the address is taken.
  """
  arguments = ()
  if coordinator != 'auto':
    if num_processes is None or process_id is None:
      raise ValueError(
        f'{coordinator=} needs num_processes and process_id too, got '
        f'{num_processes=} and {process_id=}'
      )
    if not 0 <= process_id < num_processes:
      raise ValueError(f'need 0 <= {process_id=} < {num_processes=}')
    arguments = (coordinator, num_processes, process_id)
  _joining.set()
  _filter_log()

  def join():
    # JAX's own one would hear of Orbax's steps too, which come late and from
    # another thread, so that not all processes would stop at the same one.
    jax.config.update('jax_enable_preemption_service', False)
    jax.distributed.initialize(*arguments, heartbeat_timeout_seconds=HEARTBEAT)
    _introduce()
    _agreements.append(_jax.create_preemption_sync_manager())
    _agreements[0].initialize(distributed.global_state.client)
    # Before JAX leaves the service.
    atexit.register(_leave)

  try:
    _interruptibly(join)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'{coordinator=} cannot be used: {str(error).splitlines()[0]}'
    ) from error


def _filter_log() -> None:
  """Lets `lost_peers` read what C++ writes to the standard error."""
  sys.stderr.flush()
  out = os.dup(2)
  reader = subprocess.Popen(
    [sys.executable, '-I', '-S', str(pathlib.Path(lost_peers.__file__))],
    stdin=subprocess.PIPE,
    stdout=out,
    # A terminal's Ctrl-C is not for it.
    start_new_session=True,
  )
  os.dup2(reader.stdin.fileno(), 2)
  reader.stdin.close()
  # What Python says goes where it went; a terminal stays one.
  sys.stderr = os.fdopen(out, 'w', buffering=1, errors='backslashreplace')


def _introduce() -> None:
  """Tells `lost_peers` who is who."""
  client = distributed.global_state.client
  index = distributed.global_state.process_id
  client.key_value_set(f'longctx/host/{index}', socket.gethostname())
  client.wait_at_barrier('longctx/hosts', 60_000)
  hosts = {
    int(key.rpartition('/')[2]): host
    for key, host in client.key_value_dir_get('longctx/host')
  }
  names = ' '.join(hosts[i] for i in sorted(hosts))
  os.write(2, f'{lost_peers.HOSTS}{index} {names}\n'.encode())


def _leave() -> None:
  """Stops agreeing, all together: who is asked to stop waits for all others."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    meet('longctx/leave')
  _agreements.pop().shutdown()


def _interruptibly(call: Callable[[], Any]) -> None:
  """Runs what may wait in C++, where no Ctrl-C is heard, in another thread."""
  ended = queue.SimpleQueue()

  def work():
    try:
      ended.put(call())
    except Exception as error:
      ended.put(error)

  threading.Thread(target=work, daemon=True).start()
  error = ended.get()
  if isinstance(error, Exception):
    raise error


def agree_to_stop(call: int) -> bool:
  """Whether all processes stop now, some time after one got a SIGTERM.

  Args:
    call: counts the calls, which every process makes at the same places.
  """
  return any(manager.reached_sync_point(call) for manager in _agreements)


def meet(place: str) -> None:
  """Waits for all other processes to come to this place.

  What each does by what lies on a disk they share has to be done before any of
  them writes there: they would wait for each other in other places.
  """
  if _agreements:
    client = distributed.global_state.client
    _interruptibly(lambda: client.wait_at_barrier(place, PATIENCE * 1000))


def part(error: BaseException) -> None:
  """Ends a process that fails, where others do not; returns where all do.

  JAX would wait minutes for the others, who wait for it in a collective. Where
  it fails because another one is lost, `lost_peers` tells of that meanwhile.

  Args:
    error: what it fails by; all but a `SystemExit` is still to be shown.
  """
  if not _joining.is_set():
    return
  told = isinstance(error, SystemExit)
  wait = FAREWELL if told else 2 * HEARTBEAT
  client = distributed.global_state.client
  try:
    _interruptibly(
      lambda: client.wait_at_barrier('longctx/failed', wait * 1000)
    )
  except BaseException as alone:
    if not told:
      # What ends the others ends this one too, a moment later.
      if 'DEADLINE' not in str(alone):
        time.sleep(FAREWELL)
      traceback.print_exception(error)
    sys.stdout.flush()
    os._exit(error.code if told else 1)
