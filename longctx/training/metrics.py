"""Metrics of a run: means over steps, intervals of accuracies, versions."""

import collections
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
import tqdm

from longctx.models import gate

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'tensorflow-datasets',
  'numpy',
)


def is_writer() -> bool:
  """Whether this process writes files and speaks: the first of all."""
  return jax.process_index() == 0


def say(message: str):
  """One line for the user, above a progress bar if one is shown."""
  if not is_writer():
    return
  tqdm.tqdm.write(message, file=sys.stderr)
  sys.stderr.flush()


def means(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Mean loss and accuracy of batches, from their sums over tokens."""
  totals = collections.Counter()
  for values in sums:
    for key, value in jax.device_get(values).items():
      totals[key] += float(value)
  weight = max(totals['weight'], 1e-9)
  return {
    'loss': totals['loss'] / weight,
    'accuracy': totals['correct'] / weight,
    **bits_per_byte(totals),
    **gate.shares(totals),
  }


def bits_per_byte(sums: Mapping[str, float]) -> dict[str, float]:
  """Of sums of nats and of the bytes that tokens stand for, if they do."""
  if not sums.get('bytes'):
    return {}
  return {'bits_per_byte': sums['loss'] / math.log(2) / sums['bytes']}


class Meter:
  """Sums of per-token metrics over some steps, and the time they took."""

  KEYS = ('loss', 'weight', 'correct', 'bytes')

  def __init__(self):
    self.sums = dict.fromkeys(self.KEYS, 0.0)
    self._steps = 0
    self._seconds = 0.0
    self._tokens = 0
    self._since: float | None = None

  def add(self, values: dict[str, Any], *, tokens: int):
    """Adds one step: sums over its tokens, and how many it has."""
    for key in self.KEYS:
      self.sums[key] += float(values.get(key, 0))
    self._steps += 1
    now = time.perf_counter()
    # The step after a pause would count the pause, or a compilation.
    if self._since is not None:
      self._seconds += now - self._since
      self._tokens += tokens
    self._since = now

  def start(self):
    """Counts the next step from now on."""
    self._since = time.perf_counter()

  def pause(self):
    """Leaves out the time until the end of the next step."""
    self._since = None

  def rates(self) -> dict[str, float | None]:
    """Mean loss (nats per scored token), accuracy, tokens per second.

    No rate where all steps follow a pause.
    """
    weight = max(self.sums['weight'], 1e-9)
    return {
      'loss': self.sums['loss'] / weight,
      'accuracy': self.sums['correct'] / weight,
      **bits_per_byte(self.sums),
      'tokens_per_second': self._tokens / self._seconds
      if self._seconds
      else None,
    }

  def reset(self):
    """Starts the next interval; the clock runs on."""
    since = self._since
    self.__init__()
    self._since = since

  def state(self) -> dict[str, float]:
    """The sums, so that a resumed run logs what an uninterrupted one would."""
    return dict(self.sums)

  def set_state(self, state: dict[str, float]):
    self.sums = {key: float(state.get(key, 0)) for key in self.KEYS}


def figures(rates: Mapping[str, float | None]) -> str:
  """What `Meter.rates` gives, to read."""
  text = f'loss {rates["loss"]:.4f}  accuracy {rates["accuracy"]:.4f}'
  if rates['tokens_per_second']:
    text += f'  {rates["tokens_per_second"]:,.0f} tokens/s'
  return text


def versions() -> dict[str, Any]:
  """Python, packages, git commit and hardware, for versions.json."""
  found = {
    'python': platform.python_version(),
    'longctx': _version('longctx-jax'),
  }
  found |= {name: _version(name) for name in PACKAGES}
  devices = jax.devices()
  return found | {
    'commit': git_commit(),
    'system': f'{platform.system()} {platform.machine()}',
    'cpus': os.cpu_count(),
    'platform': devices[0].platform,
    'device': devices[0].device_kind,
    'devices': len(devices),
  }


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def git_commit() -> str | None:
  """The commit this code is at, with '+' if it was edited since; or None."""

  def git(*args):
    return subprocess.run(
      ['git', '-C', str(pathlib.Path(__file__).parent), *args],
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    edited = '+' if git('status', '--porcelain', '--untracked-files=no') else ''
    return git('rev-parse', 'HEAD') + edited
  except (OSError, subprocess.SubprocessError):
    return None


def accuracy_interval(
  correct: np.ndarray, weight: np.ndarray, examples: int
) -> tuple[float, float]:
  """A 95% interval for an accuracy, from sums over batches.

  Wilson's interval with as many trials as the scatter between batches
  supports: the tokens of one example stand or fall together, so they count for
  less than as many independent ones. At least as many as there are examples
  are assumed, which is all that is known where every answer is right.

  Args:
    correct: right answers in each batch.
    weight: scored answers in each batch.
    examples: examples in all batches together.

  Returns:
    (low, high).
  """
  n, total = len(weight), float(weight.sum())
  p = float(correct.sum()) / max(total, 1e-9)
  trials = float(examples)
  if n > 1 and 0 < p < 1:
    scatter = n / (n - 1) * float(((correct - p * weight) ** 2).sum())
    trials = p * (1 - p) * total**2 / max(scatter, 1e-9)
    trials = min(max(trials, examples), total)
  z = 1.96
  centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
  spread = z / (1 + z**2 / trials)
  spread *= (p * (1 - p) / trials + z**2 / (4 * trials**2)) ** 0.5
  return max(centre - spread, 0.0), min(centre + spread, 1.0)
