"""KV cache and recurrent states of a model, to go on from what it has read.

    cache = init(model, batch_size=2, capacity=1024)
    logits, cache = extend(model, cache, tokens)        # [2, T], any T
    logits, cache = extend(model, cache, next_tokens)   # [2, 1]

Which keys, values, sums and states a layer keeps follows from its mask or its
recurrence (`longctx.attention.cache_spec`). Shapes never change, so that each
number of tokens compiles once; rows may be of different lengths.

On a mesh the slots of keys and values are spread over the devices. Those have
all the queries, read their own slots, and merge what they found by its lse
(arXiv:2408.04093), whether one token comes or a chunk of a prompt, whose other
work they divide by its tokens. States are on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.attention.cache_spec import (
  CacheBuilder,
  CacheSpec,
  LayerCache,
  empty_cache,
)
from longctx.attention.decoding_context import DecodingContext
from longctx.models.transformer import Block, Transformer
from longctx.parallel.axes import Axes, make_axes
from longctx.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """KV cache of a batch.

  Attributes:
    lengths: tokens that each row has read.
    layers: per layer, what it keeps.
    specs: per layer, what that is.
    capacity: the most tokens of a row; None for any number.
    axes: of the mesh that it is spread over; None: one device.
  """

  lengths: Int[Array, ' B']
  layers: tuple[LayerCache, ...]
  specs: tuple[CacheSpec, ...] = dataclasses.field(metadata=dict(static=True))
  capacity: int | None = dataclasses.field(metadata=dict(static=True))
  axes: Axes | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  @property
  def row_bytes(self) -> int:
    """Bytes that one row takes on all devices, whatever it has read.

    A state counts once.
    """
    return sum(entry.nbytes() for spec in self.specs for entry in spec)


def init(
  model: Transformer,
  *,
  batch_size: int,
  capacity: int | None = None,
  mesh: Mesh | None = None,
  axis: str | tuple[str, ...] = 'seq',
  blocks: Sequence[Block] | None = None,
) -> Cache:
  """The cache of rows that have not read a token.

  Args:
    model: with or without values.
    batch_size: rows B.
    capacity: the most tokens that a row will have; None for any number, which
      takes layers that forget or keep a state.
    mesh: from `parallel.make_mesh`, to spread the cache over; None: one device.
    axis: mesh axis of the slots, or several. Rows lie along 'data' and heads
      along 'model' where the mesh has those and `axis` does not name them.
    blocks: those whose memory it is; None: all of the model's.

  Raises:
    ValueError: a capacity below 1, or none where a layer keeps every token;
      rows that do not fit the mesh.
    NotImplementedError: a layer reads later tokens, or the model has a gate.
  """
  if capacity is not None and capacity < 1:
    raise ValueError(f'{capacity=} must be at least 1, or None')
  if blocks is None:
    if model.is_gated:
      raise NotImplementedError(
        'a model with a gate keeps a context and what passed: take '
        'longctx.decoding.gated_cache, or a Generator'
      )
    check_positions(model, capacity)
    blocks = model.blocks
  axes, shards = None, 1
  if mesh is not None:
    axes = make_axes(mesh, axis)
    axes.check(batch=batch_size)
    shards = axes.size(axes.seq)
  specs = tuple(
    block.attention.cache_spec(capacity, shards=shards) for block in blocks
  )
  return Cache(
    lengths=jnp.zeros(batch_size, jnp.int32, device=of_rows(axes)),
    layers=tuple(empty_cache(spec, batch_size, axes) for spec in specs),
    specs=specs,
    capacity=capacity,
    axes=axes,
  )


def check_positions(model: Transformer, capacity: int | None) -> None:
  """Raises ValueError where rows may be longer than learned positions."""
  config = model.config
  if config.position_encoding == 'learned' and (
    capacity is None or capacity > config.max_positions
  ):
    raise ValueError(
      f'{capacity=} must be at most max_positions={config.max_positions}: '
      'learned positions do not extrapolate'
    )


def of_rows(axes: Axes | None) -> NamedSharding | None:
  """Where arrays [B, ...] lie that every device of a row has."""
  return None if axes is None else NamedSharding(axes.mesh, P(axes.data))


def extend(
  model: Transformer, cache: Cache, tokens: Int[Array, 'B T'], **fields: Any
) -> tuple[Float[Array, 'B Q V'], Cache]:
  """Reads more tokens: logits after each, and the cache that knows them.

  The logits are those of the model on the whole rows. Tokens beyond the
  capacity are not refused here, where lengths are not known before the program
  runs; the caller counts them.

  Args:
    model: which the cache was made for.
    cache: what came before.
    tokens: the next ones of every row.
    **fields: of `DecodingContext`: `valid`, which of the tokens are a row's
      own, `query_indices`, places on the axis T whose logits are wanted, and
      `step`.
  """
  positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
  x = model.embed(tokens, positions=positions)
  x, cache = advance(model.blocks, cache, x, **fields)
  return model.logits(model.norm(x)), cache


def advance(
  blocks: Sequence[Block],
  cache: Cache,
  x: Float[Array, 'B T D'],
  *,
  valid: Bool[Array, 'B T'] | None = None,
  query_indices: Int[Array, 'B Q'] | None = None,
  step: Int[Array, ''] | int | None = None,
) -> tuple[Float[Array, 'B Q D'], Cache]:
  """`extend` of some blocks of a model, from the inputs of the first one."""
  T, axes = x.shape[1], cache.axes
  if axes is not None and T % axes.size(axes.seq) == 0:
    x = lax.with_sharding_constraint(x, NamedSharding(axes.mesh, axes.spec()))
  positions = cache.lengths[:, None] + jnp.arange(T)
  layers = []
  for index, block in enumerate(blocks):
    context = DecodingContext(
      builder=CacheBuilder(spec=cache.specs[index], cache=cache.layers[index]),
      lengths=cache.lengths,
      positions=positions,
      valid=valid,
      query_indices=query_indices if index == len(blocks) - 1 else None,
      step=step,
      axes=axes,
    )
    x = block(x, context)
    layers.append(tuple(context.builder.arrays))
  counts = T if valid is None else valid.sum(1)
  cache = dataclasses.replace(
    cache, lengths=cache.lengths + counts, layers=tuple(layers)
  )
  return x, _stay(cache)


def _stay(cache: Cache) -> Cache:
  """Keeps arrays where they were, so that one program serves every call."""
  axes = cache.axes
  if axes is None:
    return cache
  places = tuple(
    tuple(entry.sharding(axes) for entry in spec) for spec in cache.specs
  )
  layers, lengths = lax.with_sharding_constraint(
    (cache.layers, cache.lengths), (places, of_rows(axes))
  )
  return dataclasses.replace(cache, layers=layers, lengths=lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheDecoder:
  """Decoder over the KV cache of a model, see `decoding.decoder.Decoder`.

  Attributes are the arguments of `init`, and `max_new`, the most tokens of an
  answer, where a gate has to know.
  """

  capacity: int | None = None
  mesh: Mesh | None = None
  axis: str | tuple[str, ...] = 'seq'
  max_new: int | None = None

  def init(self, model: Transformer, batch_size: int, **options: Any) -> Any:
    place = dict(capacity=self.capacity, mesh=self.mesh, axis=self.axis)
    return init(model, batch_size=batch_size, **{**place, **options})

  def prefill(self, model, cache, tokens, logits, *, valid, **fields):
    found, cache = extend(
      model,
      cache,
      tokens,
      valid=valid,
      query_indices=last_place(valid),
      **fields,
    )
    return jnp.where(valid.any(1)[:, None], found[:, 0], logits), cache

  def begin(self, model, cache, logits, **fields):
    del model, fields
    return logits, cache

  def extend(self, model, cache, tokens, **fields):
    return extend(model, cache, tokens, **fields)


def last_place(valid: Bool[Array, 'B T']) -> Int[Array, 'B 1']:
  """The place of each row's last token, 0 where there is none."""
  return jnp.maximum(valid.sum(1, keepdims=True) - 1, 0)
