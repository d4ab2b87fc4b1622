"""Progress bar, or a line in ten seconds where no terminal is.

Both tell what is done now and for how long, also within a step or a compilation
of minutes. Only the first of several processes speaks.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import tqdm

from longctx.training import metrics

# Seconds between two looks of a bar, and between two lines.
REFRESH = 1.0
LINES = 10.0


class _Bar(tqdm.tqdm):
  # No thread of tqdm's own, which would outlive the bar.
  monitor_interval = 0


class Progress:
  """Progress bar that tells what is being done, while its context lasts."""

  def __init__(
    self,
    name: str,
    total: int,
    *,
    start: int = 0,
    unit: str = 'step',
    bar: bool = True,
  ):
    """Stands at `start` of `total` units.

    Args:
      name: of what advances.
      total: units at the end.
      start: units that are done.
      unit: what one is called.
      bar: whether a terminal has a bar; otherwise it has lines too.
    """
    writer = metrics.is_writer()
    self._name, self._unit = name, unit
    self._done, self._total = start, total
    self._bar = _Bar(
      desc=name,
      total=total,
      initial=start,
      unit=unit,
      unit_scale=total >= 10_000,
      dynamic_ncols=True,
      file=sys.stderr,
      disable=not (bar and writer and sys.stderr.isatty()),
    )
    self._figures, self._figures_at = '', 0.0
    self._said = True
    self._activity, self._expected = '', 0.0
    self._since = time.monotonic()
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    if writer:
      self._thread.start()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *unused):
    self._end.set()
    if self._thread.is_alive():
      self._thread.join()
    self._bar.close()
    if self._bar.disable and not self._said:
      metrics.say(self._line())

  def advance(self, units: int = 1, *, figures: str = ''):
    """Counts units that are done; figures stay in sight until others come."""
    self._done += units
    self._since = time.monotonic()
    if figures:
      self._figures, self._figures_at = figures, self._since
      self._said = False
      self._bar.set_postfix_str(figures, refresh=False)
    self._bar.update(units)

  def stale(self) -> bool:
    """Whether the figures are so old that a line would repeat them."""
    return time.monotonic() - self._figures_at > LINES

  @contextlib.contextmanager
  def doing(
    self, activity: str, expected: float = 0.0, *, done: str = ''
  ) -> Iterator[None]:
    """Names what is being done.

    Args:
      activity: its name.
      expected: seconds that it will take, if that is known.
      done: where it took more than a second, this is said with the time.
    """
    self._activity, self._expected = activity, expected
    begun = self._since = time.monotonic()
    if activity and not self._bar.disable:
      self._bar.set_postfix_str(self._status())
    try:
      yield
    finally:
      self._activity, self._expected = '', 0.0
      self._since = time.monotonic()
    if done and self._since - begun > 1:
      metrics.say(f'{self._name}: {done} {span(self._since - begun)}')

  def _watch(self):
    while not self._end.wait(LINES if self._bar.disable else REFRESH):
      if self._bar.disable:
        metrics.say(self._line())
        self._said = True
      else:
        self._bar.set_postfix_str(self._status())

  def _line(self) -> str:
    where = f'{self._unit} {self._done:,}/{self._total:,}'
    return f'{self._name}: {where}  {self._status()}'.rstrip()

  def _status(self) -> str:
    """The figures, and what takes more than a moment."""
    seconds = time.monotonic() - self._since
    parts = [self._figures] if self._figures else []
    if self._activity or seconds > LINES:
      what = self._activity or f'this {self._unit}'
      about = f' of about {span(self._expected)}' if self._expected else ''
      parts.append(f'{what} {span(seconds)}{about}')
    return ', '.join(parts)


def span(seconds: float) -> str:
  """A time to read: 34 s, 22 min, 3.5 h."""
  if seconds < 120:
    return f'{seconds:.0f} s'
  if seconds < 7200:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def matmul_rate(dtype: str) -> float:
  """FLOPs per second of matrix products on a device here, as measured."""
  N = 1024
  x = jax.device_put(jnp.ones((N, N), dtype), jax.local_devices()[0])
  product = jax.jit(lambda x: x @ x / N)
  x = jax.block_until_ready(product(x))
  count, begun = 0, time.perf_counter()
  while (seconds := time.perf_counter() - begun) < 0.2:
    x = jax.block_until_ready(product(x))
    count += 1
  return 2 * N**3 * count / seconds
