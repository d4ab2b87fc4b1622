"""Mask algebra: attention masks, `&` and `|`, and what is derived from them."""

from __future__ import annotations

import abc
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from longctx.masks import checks, counting
from longctx.masks.counting import Positions, Range
from longctx.typing import Bool, Int

EMPTY, PARTIAL, FULL = 0, 1, 2


class KVRetention(NamedTuple):
  """KV retention: the first keys and a window, beyond which none is read.

  A query at q reads a key at k <= q only if k < columns or q - k < window.

  Attributes:
    columns: first keys that queries may read from any distance.
    window: keys up to the query, its own position's included; None for all.
  """

  columns: int
  window: int | None

  def slots(self, seq_len: int | None) -> int:
    """How many keys there are to keep of `seq_len`, None for any number.

    Raises:
      ValueError: of any number of keys, all are to be kept.
    """
    most = None if self.window is None else self.columns + self.window
    if most is None and seq_len is None:
      raise ValueError(
        'every key may be read again, so no memory holds an endless stream: '
        'give a capacity, or take layers with a window or a recurrence'
      )
    return min(n for n in (most, seq_len) if n is not None)

  def union(self, other: KVRetention) -> KVRetention:
    """The retention of two masks together."""
    columns = max(self.columns, other.columns)
    if self.window is None or other.window is None:
      return KVRetention(columns, None)
    return KVRetention(columns, max(self.window, other.window))


@dataclasses.dataclass(frozen=True)
class Mask(abc.ABC):
  """Attention mask: which keys a query may read, by their positions."""

  # Arrays leave `array & mask` to the mask, which refuses them.
  __array_ufunc__ = None

  @abc.abstractmethod
  def allowed(self, q_positions: Positions, k_positions: Positions):
    """True where the query may read the key; pair by pair, and in integers.

    Args:
      q_positions: integer positions of queries, any shape.
      k_positions: integer positions of keys, broadcastable against the queries.

    Returns:
      Booleans that broadcast to the shape of the pairs.
    """

  def bounds(self, q: Range, k: Range):
    """Whether some, and whether all, pairs of two ranges may be allowed.

    For positions that are known only at run time. Where a mask cannot tell, it
    says yes to some and no to all, which costs time and is still right.

    Args:
      q: positions of blocks of queries, any shape.
      k: positions of blocks of keys, broadcastable.

    Returns:
      (some, all): Booleans of the broadcast shape. some is never no where a
      pair is allowed; all is never yes where one is not.
    """
    everywhere = q.low - k.low == q.low - k.low
    return everywhere, ~everywhere

  def kv_retention(self) -> KVRetention:
    """Keys that decoding has to keep, as few as the mask can tell."""
    return KVRetention(0, None)

  @property
  def is_causal(self) -> bool:
    """Whether it is certain that no query reads a later key."""
    return False

  @abc.abstractmethod
  def primitives(self) -> tuple[Primitive, ...]:
    """The primitive masks this one is made of."""

  @abc.abstractmethod
  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    """Evaluates the Boolean expression on values given per primitive mask."""

  def __and__(self, other: Mask) -> Mask:
    return And(self, other)

  def __or__(self, other: Mask) -> Mask:
    return Or(self, other)

  # For what is no mask, and is refused.
  __rand__, __ror__ = __and__, __or__

  def dense(self, T: int, S: int) -> Bool[np.ndarray, 'T S']:
    """The mask as a T x S array, for oracles and pictures."""
    q, k = np.arange(T)[:, None], np.arange(S)[None, :]
    return counting.allowed_on_host(self, q, k)

  def block_map(
    self, T: int, S: int, block_q: int, block_k: int
  ) -> Int[np.ndarray, 'nq nk']:
    """Which blocks hold no allowed pair (0), some (1) or only such pairs (2).

    The last block of a row or column may be short; it is full when all the
    pairs that exist are allowed.

    Args:
      T: number of queries, at positions 0 to T - 1.
      S: number of keys, at positions 0 to S - 1.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      int8[ceil(T / block_q), ceil(S / block_k)].
    """
    q_edges, k_edges = _edges(T, block_q), _edges(S, block_k)
    out = np.empty((len(q_edges) - 1, len(k_edges) - 1), np.int8)
    for row, counts in enumerate(self._count_rows(q_edges, k_edges)):
      area = (q_edges[row + 1] - q_edges[row]) * np.diff(k_edges)
      out[row] = np.where(counts == area, FULL, counts > 0)
    return out

  def count(
    self, q_edges: Int[np.ndarray, ' Q'], k_edges: Int[np.ndarray, ' K']
  ) -> Int[np.ndarray, 'q k']:
    """Allowed pairs, exactly, of each interval of queries with each of keys.

    Args:
      q_edges: ascending positions; interval i is [q_edges[i], q_edges[i + 1]).
      k_edges: likewise for keys.

    Returns:
      int64[Q - 1, K - 1].
    """
    return np.stack(list(self._count_rows(q_edges, k_edges)))

  def num_allowed(self, T: int, S: int) -> int:
    """How many of the T x S pairs are allowed, exactly."""
    # Strips bound the memory of masks that are cut into many small cells.
    strips = self._count_rows(_edges(T, max(1024, T // 64)), np.array([0, S]))
    return sum(int(counts.sum()) for counts in strips)

  def useful_flops(self, T: int, S: int, head_dim: int) -> int:
    """FLOPs of one head's forward pass on the allowed pairs alone.

    Two products, q kᵀ and p v, of 2 head_dim FLOPs per pair each; the backward
    pass has five such products, 2.5 times as many.
    """
    return 4 * head_dim * self.num_allowed(T, S)

  def _count_rows(
    self, q_edges: np.ndarray, k_edges: np.ndarray
  ) -> Iterator[np.ndarray]:
    """Yields, per interval of queries, the allowed pairs per key interval."""
    check_mask(self, int(q_edges[-1]), int(k_edges[-1]))
    return counting.count_rows(self, q_edges, k_edges)


@dataclasses.dataclass(frozen=True)
class Primitive(Mask):
  """Attention mask that is not made of others, such as one of your own.

  A frozen dataclass that defines `allowed` is right everywhere. The rest are
  declarations, which make it fast: `shift_invariant` (of q - k alone) or `cuts`
  for block maps and counts, `bounds` to skip blocks at positions known at run
  time, `is_causal` and `kv_retention` for decoding. `check_mask` holds them
  against `allowed`.
  """

  shift_invariant = False

  def cuts(self, T: int, S: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions of queries, and of keys, between which `allowed` is constant.

    Args:
      T: number of queries; cuts beyond are of no use.
      S: number of keys.

    Returns:
      None where nothing is declared: pairs are then counted one by one.
    """

  def primitives(self) -> tuple[Primitive, ...]:
    return (self,)

  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    return leaf(self)


@dataclasses.dataclass(frozen=True)
class _Combination(Mask):
  """Combination of two attention masks by a Boolean operator."""

  a: Mask
  b: Mask
  join: ClassVar[Callable[[Any, Any], Any]]

  def __post_init__(self):
    check_mask(self.a)
    check_mask(self.b)

  def primitives(self) -> tuple[Primitive, ...]:
    return self.a.primitives() + self.b.primitives()

  def allowed(self, q_positions: Positions, k_positions: Positions):
    a = self.a.allowed(q_positions, k_positions)
    return self.join(a, self.b.allowed(q_positions, k_positions))

  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    return self.join(self.a.combine(leaf), self.b.combine(leaf))

  def bounds(self, q: Range, k: Range):
    return tuple(map(self.join, self.a.bounds(q, k), self.b.bounds(q, k)))


@dataclasses.dataclass(frozen=True)
class And(_Combination):
  """Intersection of two attention masks: the pairs that both allow."""

  join = staticmethod(operator.and_)

  @property
  def is_causal(self) -> bool:
    return self.a.is_causal or self.b.is_causal

  def kv_retention(self) -> KVRetention:
    # Each of both holds; the narrower window keeps less in the end.
    size = lambda kept: (kept.window is None, kept.window, kept.columns)
    return min(self.a.kv_retention(), self.b.kv_retention(), key=size)


@dataclasses.dataclass(frozen=True)
class Or(_Combination):
  """Union of two attention masks: the pairs that either allows."""

  join = staticmethod(operator.or_)

  @property
  def is_causal(self) -> bool:
    return self.a.is_causal and self.b.is_causal

  def kv_retention(self) -> KVRetention:
    return self.a.kv_retention().union(self.b.kv_retention())


def check_mask(mask: Any, T: int | None = None, S: int | None = None) -> None:
  """Raises unless it is a mask whose declarations agree with `allowed`.

  Checked once per mask and size, and only what is not of this package: all
  pairs of the first 64 positions, and of some beyond them up to T and S. What
  is false between those goes unnoticed.

  Args:
    mask: who reads whom.
    T: number of queries; None to see only whether it is a mask.
    S: number of keys, that of the queries when None.

  Raises:
    TypeError: an array or anything else that is no mask.
    ValueError: a declaration that is false.
    NotImplementedError: an `allowed` that computes in floats.
  """
  if not isinstance(mask, Mask):
    is_class = isinstance(mask, type)
    what = f'the class {mask.__name__}' if is_class else type(mask).__name__
    raise TypeError(
      f'a mask is a rule over positions, and {what} is no '
      'Mask: take one, such as Causal() & SlidingWindow(127), and give what is '
      'packed or padded as q_segment_ids and k_segment_ids'
    )
  for part in () if T is None else _own_parts(mask):
    try:
      hash(part)
    except TypeError as error:
      raise TypeError(
        f'{type(part).__name__} has a field that cannot be hashed ({error}): '
        'masks name programs, so that arrays and lists go in as tuples'
      ) from error
    compares = '__eq__' in vars(type(part))
    if (vars(part) and not compares) or any(
      not field.compare for field in dataclasses.fields(part)
    ):
      raise TypeError(
        f'{type(part).__name__} must be a @dataclasses.dataclass(frozen=True) '
        'whose fields all compare: otherwise masks that differ count as '
        'equal, and share programs'
      )
    checks.check_declarations(part, T, T if S is None else S)


def _own_parts(mask: Mask) -> list[Mask]:
  """The parts of a mask that are not of this package."""
  if type(mask) in (And, Or):
    return _own_parts(mask.a) + _own_parts(mask.b)
  parts = mask, *mask.primitives()
  return [p for p in parts if type(p).__module__.split('.')[0] != 'longctx']


def _edges(length: int, block: int) -> np.ndarray:
  """Block boundaries 0, block, 2 block, …, length."""
  if length < 1 or block < 1:
    raise ValueError(f'need {length=} >= 1 and {block=} >= 1')
  return np.append(np.arange(0, length, block), length)
