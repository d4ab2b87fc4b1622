"""Signal handling of training: what asks a run to stop, and when it does."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Signal handler: notes SIGTERM and SIGINT; a second SIGINT interrupts."""

  def __init__(self):
    self.signum: int | None = None
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    # With several processes JAX listens, so that all stop at the same step.
    if jax.process_count() > 1:
      return self
    # Python delivers signals to the main thread, and lets no other listen.
    if threading.current_thread() is threading.main_thread():
      for signum in (signal.SIGTERM, signal.SIGINT):
        self._previous[signum] = signal.signal(signum, self._note)
    return self

  def _note(self, signum, frame):
    self.signum = signum
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def at(self, step: int) -> bool:
    """Whether to stop at this step, which all processes agree on."""
    several = jax.process_count() > 1
    if several and multihost_utils.reached_preemption_sync_point(step):
      self.signum = signal.SIGTERM
    return self.signum is not None

  def __exit__(self, *unused):
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
