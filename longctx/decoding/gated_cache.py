"""KV cache of a gated transformer: of a context, and then of what passed.

The blocks below the gate read a prompt as any model does, and their outputs
wait for its end. Then few of them pass: the caches of the blocks above hold
`gate.num_kept` tokens and the answer, whatever the prompt's length.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from longctx.decoding import cache as cache_lib
from longctx.decoding.cache import Cache, CacheDecoder
from longctx.models.gated import GatedTransformer
from longctx.parallel.axes import Axes
from longctx.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedCache:
  """KV cache of a batch, on both sides of a gate.

  Attributes:
    below: of the blocks below the gate.
    above: of those above it.
    outputs: of the blocks below, for each token of the prompt.
  """

  below: Cache
  above: Cache
  outputs: Float[Array, 'B T D']

  @property
  def lengths(self) -> Int[Array, ' B']:
    """Tokens that each row has read."""
    return self.below.lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDecoder(CacheDecoder):
  """Decoder of a gated transformer, over a `GatedCache`."""

  def __post_init__(self):
    if self.capacity is None:
      raise ValueError(
        'a gate chooses from the whole prompt: give a capacity to hold it'
      )

  def init(self, model: GatedTransformer, batch_size: int) -> GatedCache:
    """The cache of rows that have not read a token; raises as `cache.init`."""
    config, capacity = model.config, self.capacity
    cache_lib.check_positions(model, capacity)
    # Of what passes, and the answer.
    most = config.gate.num_kept + (self.max_new or capacity)
    below, above = (
      super(GatedDecoder, self).init(
        model, batch_size, capacity=size, blocks=blocks
      )
      for blocks, size in ((model.below, capacity), (model.above, most))
    )
    axes = below.axes
    shards = 1 if axes is None else axes.size(axes.seq)
    shape = (batch_size, -(-capacity // shards) * shards, config.d_model)
    outputs = jnp.zeros(shape, config.dtype, device=_of_tokens(axes))
    return GatedCache(below=below, above=above, outputs=outputs)

  def prefill(self, model, cache, tokens, logits, *, valid, **fields):
    x, below = _below(model, cache, tokens, valid=valid, **fields)
    places = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    # Beyond the end: not written.
    places = jnp.where(valid, places, cache.outputs.shape[1])
    rows = jnp.arange(tokens.shape[0])[:, None]
    outputs = cache.outputs.at[rows, places].set(x, mode='drop')
    if below.axes is not None:
      # They stay where they were.
      place = _of_tokens(below.axes)
      outputs = lax.with_sharding_constraint(outputs, place)
    return logits, dataclasses.replace(cache, below=below, outputs=outputs)

  def begin(self, model, cache, logits, **fields):
    """Lets pass what the prompts' last tokens ask for."""
    passed = model.gate(cache.outputs, cache.lengths - 1, answer=1)
    fields['valid'] = passed.kept.places >= 0
    fields['query_indices'] = cache_lib.last_place(fields['valid'])
    logits, cache = _above(model, cache, passed.x, **fields)
    return logits[:, 0], cache

  def extend(self, model, cache, tokens, **fields):
    """Reads tokens behind the question, all of which pass."""
    x, below = _below(model, cache, tokens, **fields)
    cache = dataclasses.replace(cache, below=below)
    return _above(model, cache, x, **fields)


def _below(model, cache, tokens, **fields):
  positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
  x = model.embed(tokens, positions=positions)
  return cache_lib.advance(model.below, cache.below, x, **fields)


def _above(model, cache, x, **fields):
  x, above = cache_lib.advance(model.above, cache.above, x, **fields)
  logits = model.logits(model.norm(x))
  return logits, dataclasses.replace(cache, above=above)


def _of_tokens(axes: Axes | None) -> NamedSharding | None:
  return None if axes is None else NamedSharding(axes.mesh, axes.spec())
