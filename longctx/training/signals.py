"""Signal handling of training: what asks a run to stop, and when it does."""

import os
import signal
import threading

import jax

from longctx.parallel import processes


class StopRequest:
  """Signal handler: SIGTERM, SIGINT and SIGHUP ask to save and to stop.

  A second SIGINT interrupts. Of several processes any one may get them.
  """

  def __init__(self):
    self.signum: int | None = None
    self._received: int | None = None
    self._several = jax.process_count() > 1
    self._calls = 0
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    # Python delivers signals to the main thread, and lets no other listen.
    if threading.current_thread() is not threading.main_thread():
      return self
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
      # JAX listens itself to what a cluster sends; `nohup` wants no end.
      if (self._several and signum == signal.SIGTERM) or (
        signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN
      ):
        continue
      self._previous[signum] = signal.signal(signum, self._note)
    return self

  def _note(self, signum, frame):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not self._several:
      self.signum = signum
    elif self._received is None:
      # A second one would end this process.
      os.kill(os.getpid(), signal.SIGTERM)
    self._received = signum

  def due(self) -> bool:
    """Whether to stop now: asked after every step, all processes agree."""
    self._calls += 1
    if processes.agree_to_stop(self._calls):
      self.signum = self._received or signal.SIGTERM
    return self.signum is not None

  def __exit__(self, *unused):
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
