"""Draws of a call on a mesh: arrays, how a program gets them, and a mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import parallel
from longctx.masks import (
  BlockSparse,
  Causal,
  Dilated,
  Full,
  GlobalTokens,
  PrefixColumns,
  PrefixRows,
  RandomBlocks,
  SlidingWindow,
)
from longctx.parallel.layout import LAYOUTS, SequenceLayout

MESHES = [
  *[(2, 2, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2)] * 2,
  *[(1, 8, 1), (1, 4, 2), (1, 3, 1), (2, 1, 2), (2, 3, 1)],
]
# Compiling is nearly all of the time, and these programs are small.
FAST = {'xla_backend_optimization_level': 0}


@dataclasses.dataclass(frozen=True)
class Given:
  """An array of a call, and how the program gets it.

  Attributes:
    value: the array.
    how: 'argument', 'constant', or, of rows that are alike, 'broadcast' from an
      argument without rows or 'made' of a constant without them.
    spec: sharding of an argument.
  """

  value: np.ndarray
  how: str
  spec: P

  def argument(self, mesh: Any) -> Any:
    if self.how in ('constant', 'made'):
      return None
    x = self.value[0] if self.how == 'broadcast' else self.value
    return jax.device_put(x, NamedSharding(mesh, self.spec))

  def inside(self, argument: Any) -> Any:
    if self.how == 'argument':
      return argument
    if self.how == 'constant':
      return jnp.asarray(self.value)
    row = self.value[0] if argument is None else argument
    if argument is None and (row == row.flat[0]).all():
      return jnp.full(self.value.shape, row.flat[0], row.dtype)
    if argument is None and np.array_equal(row, np.arange(len(row))):
      row = jnp.arange(len(row), dtype=row.dtype)
    return jnp.broadcast_to(row, self.value.shape)


class Refused(Exception):
  """A call that says why it gives no answer."""


class Draw:
  """Draws one call: everything follows from (seed, index)."""

  def __init__(self, seed: int, index: int, ops: list[str]):
    self.rng = np.random.default_rng([seed, index])
    self.op = self.pick(ops)
    self.mesh_shape = self.pick(MESHES)
    data, seq, model = self.mesh_shape
    self.mesh = parallel.make_mesh(*self.mesh_shape)
    self.scheme = self.pick(parallel.SCHEMES)
    folds = self.scheme == 'ring+ulysses' or (
      self.scheme == 'all_gather' and self.chance(0.2)
    )
    self.axis = ('seq', 'model') if folds else 'seq'
    self.shards = seq * (model if folds else 1)
    self.B = data * self.pick([1, 1, 1, 2])
    self.T = self.pick([16, 16, 24, 48, 13, 5])
    self.K = self.pick([2, 4] if model > 1 and not folds else [1, 2, 8])
    self.layout = SequenceLayout(self.pick(LAYOUTS), self.T, self.shards)
    self.in_layout = self.chance(0.25)
    # Without, every operation is compiled alone, and costs ten calls.
    self.jit = self.chance(0.97)

  def pick(self, options: Any) -> Any:
    return options[self.rng.integers(len(options))]

  def chance(self, share: float) -> bool:
    return self.rng.random() < share

  def given(self, value: np.ndarray) -> Given:
    """How the program gets an array."""
    B, hows = len(value), ['argument', 'argument', 'constant']
    if (value == value[:1]).all():
      hows += ['broadcast', 'made', 'made']
    how = self.pick(hows)
    if how == 'broadcast':
      fits = len(value[0]) % self.mesh_shape[1] == 0
      return Given(value, how, self.pick([P(), P('seq')] if fits else [P()]))
    rows = [None] + ['data'] * (B % self.mesh_shape[0] == 0)
    fits = value.shape[1] % self.mesh_shape[1] == 0
    specs = [P(row) for row in rows] + [P(row, 'seq') for row in rows] * fits
    return Given(value, how, self.pick(specs))

  def floats(self, *shape: int) -> np.ndarray:
    """Numbers [B, ...], at times the same in all rows."""
    same = self.chance(0.2)
    x = self.rng.normal(size=(1 if same else self.B, *shape[1:]))
    return np.broadcast_to(x, shape).astype(np.float32)

  def segments(self, T: int, *, returns: bool = True) -> np.ndarray:
    """Documents of rows, alike in most calls; ids may come back."""
    rows = self.pick([1, 1, self.B])
    ids = np.sort(self.rng.integers(0, self.pick([1, 2, 4]), (rows, T)), axis=1)
    if returns and self.chance(0.2):
      ids[:, T // 2 :] = ids[:, : T - T // 2]
    return np.broadcast_to(ids, (self.B, T)).astype(np.int32)

  def positions(self, T: int) -> np.ndarray:
    """Positions [1, T] or [B, T]: natural, later, in any order."""
    kind = self.pick(['natural', 'natural', 'later', 'order', 'orders'])
    rows = self.B if kind == 'orders' else 1
    at = np.stack([self.rng.permutation(T) for _ in range(rows)])
    if kind in ('natural', 'later'):
      at = np.arange(T)[None] + (7 if kind == 'later' else 0)
    rows = max(rows, self.pick([1, self.B]))
    return np.broadcast_to(at, (rows, T)).astype(np.int32)

  def mask(self) -> Any:
    number = lambda low, high: int(self.rng.integers(low, high))
    pattern = self.rng.random((20, 20)) < 0.5
    primitives = [
      Causal(),
      Full(),
      SlidingWindow(number(0, 12)),
      SlidingWindow(number(0, 9), number(0, 9)),
      Dilated(number(1, 5), number(1, 4)),
      PrefixColumns(number(0, 6)),
      PrefixRows(number(0, 6)),
      GlobalTokens(number(0, 6)),
      RandomBlocks(number(1, 6), number(1, 3), number(0, 9)),
      BlockSparse(4, tuple(map(tuple, pattern.tolist()))),
    ]
    mask = self.pick([Causal(), *primitives])
    if self.chance(0.5):
      other = self.pick(primitives)
      mask = mask & other if self.chance(0.4) else mask | other
    return mask & Causal() if self.chance(0.3) else mask

  def placed(self, x: np.ndarray, fill: Any = 0) -> np.ndarray:
    return self.layout.apply(x, fill=fill) if self.in_layout else x

  def restored(self, x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return self.layout.restore(x) if self.in_layout else x

  def where(self) -> dict[str, Any]:
    return dict(
      mesh=self.mesh,
      axis=self.axis,
      layout=self.layout if self.in_layout else self.layout.name,
      in_layout=self.in_layout,
    )

  def run(self, function: Any, arrays: dict[str, np.ndarray]) -> Any:
    """function(**arrays), each array as it was drawn to come."""
    arrays = {name: self.given(x) for name, x in arrays.items()}
    self.hows = {name: x.how for name, x in arrays.items()}

    def program(arguments):
      return function(**{n: x.inside(arguments[n]) for n, x in arrays.items()})

    if self.jit:
      program = jax.jit(program, compiler_options=FAST)
    arguments = {n: x.argument(self.mesh) for n, x in arrays.items()}
    try:
      return program(arguments)
    except (ValueError, NotImplementedError) as error:
      raise Refused(str(error)) from error

  def __str__(self) -> str:
    hidden = ('rng', 'mesh', 'layout')
    shown = {k: v for k, v in vars(self).items() if k not in hidden}
    return f'{self.layout.name} ' + ' '.join(
      f'{k}={v}' for k, v in shown.items()
    )
