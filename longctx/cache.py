"""What a model keeps of the tokens that it has read, to go on from there.

    cache = init(model, batch_size=2, capacity=1024)
    logits, cache = extend(model, cache, tokens)        # [2, T], any T
    logits, cache = extend(model, cache, next_tokens)   # [2, 1]

Which keys, values, sums and states a layer keeps follows from its mask or its
recurrence (`longctx.attention.decoding`). Shapes never change, so that each
number of tokens compiles once; rows may be of different lengths.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from longctx.attention import decoding
from longctx.model import Transformer
from longctx.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """The memory of a batch.

  Attributes:
    lengths: tokens that each row has read.
    layers: per layer, what it keeps.
    plans: per layer, what that is.
    capacity: the most tokens of a row; None for any number.
  """

  lengths: Int[Array, ' B']
  layers: tuple[decoding.Cells, ...]
  plans: tuple[decoding.Plan, ...] = dataclasses.field(
    metadata=dict(static=True)
  )
  capacity: int | None = dataclasses.field(metadata=dict(static=True))

  @property
  def row_bytes(self) -> int:
    """Bytes that one row takes, whatever it has read."""
    return sum(cell.nbytes() for plan in self.plans for cell in plan)


def init(
  model: Transformer, *, batch_size: int, capacity: int | None = None
) -> Cache:
  """The cache of rows that have not read a token.

  Args:
    model: with or without values.
    batch_size: rows B.
    capacity: the most tokens that a row will have; None for any number, which
      takes layers that forget or keep a state.

  Raises:
    ValueError: a capacity below 1, or none where a layer keeps every token.
    NotImplementedError: a layer reads later tokens.
  """
  if capacity is not None and capacity < 1:
    raise ValueError(f'{capacity=} must be at least 1, or None')
  config = model.config
  if config.positions == 'learned' and (
    capacity is None or capacity > config.max_positions
  ):
    raise ValueError(
      f'{capacity=} must be at most max_positions={config.max_positions}: '
      'learned positions do not extrapolate'
    )
  plans = tuple(block.attention.plan(capacity) for block in model.blocks)
  return Cache(
    lengths=jnp.zeros(batch_size, jnp.int32),
    layers=tuple(decoding.empty(plan, batch_size) for plan in plans),
    plans=plans,
    capacity=capacity,
  )


def extend(
  model: Transformer,
  cache: Cache,
  tokens: Int[Array, 'B T'],
  *,
  new: Bool[Array, 'B T'] | None = None,
  read: Int[Array, 'B Q'] | None = None,
  step: Int[Array, ''] | int | None = None,
) -> tuple[Float[Array, 'B Q V'], Cache]:
  """Reads more tokens: logits after each, and the cache that knows them.

  The logits are those of the model on the whole rows. Tokens beyond the
  capacity are not refused here, where lengths are not known before the program
  runs; the caller counts them.

  Args:
    model: which the cache was made for.
    cache: what came before.
    tokens: the next ones of every row.
    new: which of them are a row's tokens, the first ones of each row; None
      means all.
    read: places on the axis T whose logits are wanted; None: all, Q = T.
    step: of the training that made the parameters; None: none.
  """
  T = tokens.shape[1]
  x = model.embed(tokens, positions=cache.lengths[:, None] + jnp.arange(T))
  layers = []
  last = len(model.blocks) - 1
  for index, block in enumerate(model.blocks):
    wanted = read if index == last else None

    def attend(x, index=index, block=block, wanted=wanted):
      out, cells = block.attention.extend(
        x,
        plan=cache.plans[index],
        cells=cache.layers[index],
        lengths=cache.lengths,
        new=new,
        read=wanted,
        step=step,
      )
      layers.append(cells)
      return out

    x = block.around(attend, x, read=wanted)
  counts = T if new is None else new.sum(1)
  cache = dataclasses.replace(
    cache, lengths=cache.lengths + counts, layers=tuple(layers)
  )
  return model.logits(model.norm(x)), cache


def last_place(new: Bool[Array, 'B T']) -> Int[Array, 'B 1']:
  """The place of each row's last new token, 0 where there is none."""
  return jnp.maximum(new.sum(1, keepdims=True) - 1, 0)
