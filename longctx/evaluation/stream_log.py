"""Stream log: results and cache of an endless stream, to resume from."""

import json
import os
import pathlib
import resource
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.decoding import cache as cache_lib
from longctx.training import metrics
from longctx.training.progress import Progress


class StreamLog:
  """Stream log of a policy: its lines in stream.jsonl, and its cache."""

  def __init__(
    self, workdir: pathlib.Path, policy: str, what: Mapping[str, Any]
  ):
    """Opens it.

    Args:
      what: the settings that they depend on: lines of others are dropped, and
        their stream begins anew.
    """
    self._path = workdir / 'stream.jsonl'
    self._state = workdir / 'stream' / f'{policy}.npz'
    self._policy = policy
    self._what = json.dumps(what, sort_keys=True)
    self.position = 0
    self.lines: list[dict[str, Any]] = []

  def resume(self, cache: cache_lib.Cache | None) -> cache_lib.Cache | None:
    """The cache where the stream stopped, or the empty one that is given."""
    rows = [
      row
      for row in metrics.read_lines(self._path)
      if row['policy'] == self._policy and row['what'] == self._what
    ]
    if cache is None:
      self.position = max((row['end'] for row in rows), default=0)
    elif self._state.exists():
      with np.load(self._state) as saved:
        if str(saved['what']) == self._what:
          self.position = int(saved['position'])
          leaves, tree = jax.tree.flatten(cache)
          names = [f'leaf{index}' for index in range(len(leaves))]
          cache = jax.tree.unflatten(
            tree, [jnp.asarray(saved[name]) for name in names]
          )
    self.lines = [row for row in rows if row['end'] <= self.position]
    self._flush()
    return cache

  def write(self, begin: int, end: int, sums: np.ndarray, seconds: float):
    """Adds the line of a bucket, from its sums of loss, weight and hits."""
    loss, count, correct = map(float, sums)
    self.lines.append(
      {
        'policy': self._policy,
        'begin': begin,
        'end': end,
        'loss': loss / max(count, 1e-9),
        'accuracy': correct / max(count, 1e-9),
        'count': int(count),
        'seconds': seconds,
        'peak_memory': _peak_memory(),
        'what': self._what,
      }
    )
    self._flush()

  def save(self, cache: cache_lib.Cache, position: int):
    """Keeps the cache, to go on from here."""
    self._state.parent.mkdir(exist_ok=True)
    leaves = {
      f'leaf{index}': np.asarray(leaf)
      for index, leaf in enumerate(jax.tree.leaves(cache))
    }
    half = self._state.with_suffix('.tmp.npz')
    np.savez(half, position=position, what=self._what, **leaves)
    os.replace(half, self._state)

  def progress(self, end: int) -> Progress:
    start = min(self.position, end)
    return Progress(self._policy, end, start=start, unit='token')

  def _flush(self):
    others = [
      row
      for row in metrics.read_lines(self._path)
      if row['policy'] != self._policy
    ]
    metrics.write_lines(self._path, others + self.lines)


def _peak_memory() -> int:
  """Bytes that the process has held at most."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
