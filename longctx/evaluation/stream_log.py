"""Stream log: results and cache of an endless stream, to resume from."""

import hashlib
import json
import pathlib
import resource
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.decoding import cache as cache_lib
from longctx.training import metrics
from longctx.training.errors import DamagedFileError
from longctx.training.log_files import JsonLog, write_whole
from longctx.training.progress import Progress

KEYS = ('policy', 'what')


class StreamLog:
  """Stream log of a policy: its lines in stream.jsonl, and its state.

  The state is the cache and all lines so far, with a digest of both. So the two
  agree: a line that stream.jsonl lacks is written again, and without its state
  a stream begins anew.
  """

  def __init__(
    self, workdir: pathlib.Path, policy: str, what: Mapping[str, Any]
  ):
    """Opens it.

    Args:
      workdir: of the run.
      policy: whose lines these are.
      what: the settings that they depend on. Under others the stream begins
        anew, and the lines are moved to stream.jsonl.old.
    """
    self._log = JsonLog(workdir / 'stream.jsonl', keys=KEYS)
    self._state = workdir / 'stream' / f'{policy}.npz'
    self._policy = policy
    self._what = json.dumps(what, sort_keys=True)
    self.lines: list[dict[str, Any]] = []

  @property
  def position(self) -> int:
    """Tokens that were read."""
    return self.lines[-1]['end'] if self.lines else 0

  def resume(self, cache: cache_lib.Cache | None) -> cache_lib.Cache | None:
    """The cache where the stream stopped, or the empty one that is given."""
    mine = [r for r in self._log.rows() if r['policy'] == self._policy]
    why = f'{self._state} is missing'
    try:
      cache, self.lines = self._load(cache)
    except FileNotFoundError:
      pass
    except DamagedFileError as error:
      why = str(error)
    stale = _without(mine, self.lines)
    if any(row['what'] != self._what for row in stale):
      why = 'its settings are others than those of stream.jsonl'
    if stale:
      self._log.remove(lambda row: not _without([row], stale), keep=True)
      metrics.say(
        f'{self._policy}: {why}, so {len(stale)} lines are moved to '
        'stream.jsonl.old and measured anew'
      )
    elif not self.lines and not why.endswith('missing'):
      metrics.say(f'{self._policy}: {why}, so it is measured anew')
    if missing := _without(self.lines, mine):
      metrics.say(f'{self._policy}: {len(missing)} lines are written again')
      self._log.append(*missing)
    return cache

  def _load(self, cache: cache_lib.Cache | None) -> tuple[Any, list[dict]]:
    """The cache and the lines that were saved.

    Raises:
      FileNotFoundError: there are none.
      DamagedFileError: they cannot be read, or are of other settings.
    """
    leaves, tree = jax.tree.flatten(cache)
    try:
      with np.load(self._state) as saved:
        header = bytes(saved['header'])
        stored = [bytes(saved[f'leaf{i}']) for i in range(len(leaves))]
        whole = bytes(saved['digest']) == _digest(header, stored)
      state = json.loads(header) if whole else {}
      arrays = [
        jnp.asarray(np.frombuffer(text, x.dtype).reshape(x.shape))
        for text, x in zip(stored, leaves, strict=True)
      ]
    except FileNotFoundError:
      raise
    except Exception as error:
      # zipfile, zlib and numpy each have their own.
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise DamagedFileError(f'{self._state} is damaged ({reason})') from error
    if not whole:
      raise DamagedFileError(f'{self._state} is damaged: its digest is another')
    if state['what'] != self._what:
      raise DamagedFileError(f'{self._state} is of other settings')
    return jax.tree.unflatten(tree, arrays), state['lines']

  def write(
    self,
    begin: int,
    end: int,
    sums: np.ndarray,
    seconds: float,
    cache: cache_lib.Cache | None = None,
  ):
    """Adds the line of a bucket, and keeps the cache to go on from there.

    Args:
      begin: the first position of the bucket.
      end: the one after its last.
      sums: of loss, weight, right guesses and bytes over its tokens.
      seconds: that it took.
      cache: after it; None where the policy keeps none.
    """
    loss, count, correct, size = map(float, sums)
    self.lines.append(
      {
        'policy': self._policy,
        'begin': begin,
        'end': end,
        'loss': loss / max(count, 1e-9),
        'accuracy': correct / max(count, 1e-9),
        **metrics.bits_per_byte({'loss': loss, 'bytes': size}),
        'count': int(count),
        'seconds': seconds,
        'peak_memory': _peak_memory(),
        'what': self._what,
      }
    )
    self._save(cache)
    self._log.append(self.lines[-1])

  def _save(self, cache: cache_lib.Cache | None):
    header = json.dumps({'what': self._what, 'lines': self.lines}).encode()
    # As bytes, for numpy's format knows no bfloat16.
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(cache)]
    arrays = {f'leaf{i}': leaf for i, leaf in enumerate(leaves)}
    arrays |= {'header': header, 'digest': _digest(header, leaves)}
    arrays = {k: np.frombuffer(x, np.uint8) for k, x in arrays.items()}
    write_whole(self._state, lambda path: np.savez(path, **arrays))

  def progress(self, end: int) -> Progress:
    start = min(self.position, end)
    return Progress(self._policy, end, start=start, unit='token')


def _without(rows: list[dict], others: list[dict]) -> list[dict]:
  """Rows that are not among others; as text, for NaN is not itself."""
  texts = set(map(json.dumps, others))
  return [row for row in rows if json.dumps(row) not in texts]


def _digest(header: bytes, leaves: list[bytes]) -> bytes:
  digest = hashlib.blake2b(header, digest_size=16)
  for leaf in leaves:
    digest.update(leaf)
  return digest.digest()


def _peak_memory() -> int:
  """Bytes that the process has held at most."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
