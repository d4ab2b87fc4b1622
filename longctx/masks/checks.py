"""Checks of an attention mask's declarations against its `allowed`."""

import functools
import itertools
import re
from typing import Any

import jax
import numpy as np

from longctx.masks.counting import Range, allowed_on_host, bounds_on_host
from longctx.typing import Int

# Positions tried on either side, of which all the first.
SAMPLES, FIRST = 192, 64
# Keys of a cache that are not there yet, and that causal masks leave out.
NOWHERE = 2**30


@functools.lru_cache(maxsize=256)
def check_declarations(mask: Any, T: int, S: int) -> None:
  """Raises where a mask contradicts its `allowed`; see `masks.check_mask`."""
  q, k = _positions(T)[:, None], _positions(S)[None]
  allowed = allowed_on_host(mask, q, k)

  def refuse(wrong: np.ndarray, claim: str):
    for i, j in np.argwhere(wrong)[:1]:
      raise ValueError(
        f'{mask}: allowed says {allowed[i, j]} of the query at {q[i, 0]} and '
        f'the key at {k[0, j]}, against {claim}: correct one of them'
      )

  def by_kind(primitive):
    if primitive.shift_invariant:
      return allowed_on_host(primitive, q - k, np.zeros((1, 1), int))
    if (cuts := primitive.cuts(T, S)) is None:
      return allowed_on_host(primitive, q, k)
    return allowed_on_host(primitive, *map(_cell_start, (q, k), cuts))

  refuse(mask.combine(by_kind) != allowed, 'shift_invariant, cuts or combine')
  refuse(allowed & (k > q) & bool(mask.is_causal), 'is_causal')
  columns, window = mask.kv_retention()
  kept = (k < columns) | (window is None or q - k < window)
  refuse(allowed & (k <= q) & ~kept, f'kv_retention, {columns=} and {window=}')
  for rows, columns in itertools.product((1, 3, 16), repeat=2):
    q_range = Range(q[::rows], q[rows - 1 :: rows])
    k_range = Range(k[:, ::columns], k[:, columns - 1 :: columns])
    blocks = bounds_on_host(mask, q_range, k_range)
    some, all_ = blocks.repeat(rows, 1).repeat(columns, 2)
    refuse(allowed & ~some | all_ & ~allowed, 'bounds')

  edge = SAMPLES // 4
  alone = allowed_on_host(mask, q[edge:-edge], k[:, edge:-edge])
  refuse(
    np.pad(alone, edge) != np.pad(allowed[edge:-edge, edge:-edge], edge),
    'itself among other pairs, and a pair is judged by its two positions alone',
  )
  # As kernels do: in int32, and keys before queries.
  k32 = np.int32(np.append(k, NOWHERE)[:, None])
  with jax.ensure_compile_time_eval():
    if _computes_floats(mask):
      raise NotImplementedError(
        f'{mask} computes in floats, which round otherwise on a device than in '
        'numpy: compute in integers, as in 2 * k_positions <= q_positions'
      )
    turned = np.asarray(_traced(mask, np.int32(q.T), k32))
  turned = np.broadcast_to(turned, (SAMPLES + 1, SAMPLES))
  refuse(
    allowed != turned[:-1].T,
    'itself in jax.numpy, whose integers have 32 bits',
  )
  if mask.is_causal and turned[-1].any():
    raise ValueError(f'{mask} is_causal, and reads a key at {NOWHERE=}')


@functools.partial(jax.jit, static_argnums=0)
def _traced(mask: Any, q: jax.Array, k: jax.Array) -> jax.Array:
  return mask.allowed(q, k)


@functools.lru_cache(maxsize=256)
def _computes_floats(mask: Any) -> bool:
  one = jax.ShapeDtypeStruct((1, 1), np.int32)
  program = _traced.lower(mask, one, one).as_text()
  return re.search(r'<(\d+x)*b?f\d', program) is not None


def _cell_start(x: np.ndarray, cuts: Any) -> np.ndarray:
  """The cut before each position."""
  cuts = np.unique(np.append(0, np.asarray(cuts, int)))
  return cuts[np.searchsorted(cuts, x, side='right') - 1]


def _positions(length: int) -> Int[np.ndarray, ' n']:
  """Ascending positions to try, all of them where they are few."""
  powers = 2 ** np.arange(length.bit_length())[:, None] + np.arange(-2, 2)
  some = [*range(FIRST), *powers.flat, *range(length - 8, length)]
  tried = np.unique([x for x in some if 0 <= x < length])
  if length <= SAMPLES:
    tried = np.arange(length)
  more = np.random.default_rng(length).integers(0, length, SAMPLES - len(tried))
  return np.sort(np.append(tried, more))
