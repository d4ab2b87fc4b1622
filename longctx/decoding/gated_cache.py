"""What a model with a gate keeps: of a context, and then of what passed.

    cache = init(model, batch_size=2, capacity=1024, max_new=9)
    cache = read(model, cache, tokens)              # the prompt, in any parts
    logits, cache = ask(model, cache)               # its last token asks
    logits, cache = extend(model, cache, tokens)    # [2, 1], the answer

The blocks below the gate read a prompt as any model does, and their outputs
wait for its end. Then few of them pass: the caches of the blocks above hold
`gate.num_kept` tokens and the answer, whatever the prompt's length.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from longctx.decoding import cache as cache_lib
from longctx.decoding.cache import Cache
from longctx.models.transformer import Transformer
from longctx.parallel.axes import Axes
from longctx.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedCache:
  """The memory of a batch.

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


def init(
  model: Transformer,
  *,
  batch_size: int,
  capacity: int,
  max_new: int | None = None,
  mesh: Mesh | None = None,
  axis: str | tuple[str, ...] = 'seq',
) -> GatedCache:
  """The cache of rows that have not read a token.

  Args:
    model: with or without values.
    batch_size: rows B.
    capacity: the most tokens of a row, its answer included.
    max_new: the most tokens of an answer; None: any number up to the capacity.
    mesh: as in `cache.init`.
    axis: as in `cache.init`.

  Raises:
    ValueError, NotImplementedError: as `cache.init` does.
  """
  config, after = model.config, model.config.gate.after
  if config.position_encoding == 'learned' and capacity > config.max_positions:
    raise ValueError(
      f'{capacity=} must be at most max_positions={config.max_positions}: '
      'learned positions do not extrapolate'
    )
  below, above = (
    cache_lib.init(
      model,
      batch_size=batch_size,
      capacity=size,
      mesh=mesh,
      axis=axis,
      blocks=blocks,
    )
    for blocks, size in (
      (model.blocks[:after], capacity),
      (model.blocks[after:], config.gate.num_kept + (max_new or capacity)),
    )
  )
  axes = below.axes
  shards = 1 if axes is None else axes.size(axes.seq)
  shape = (batch_size, -(-capacity // shards) * shards, config.d_model)
  outputs = jnp.zeros(shape, config.dtype, device=_of_tokens(axes))
  return GatedCache(below=below, above=above, outputs=outputs)


def read(
  model: Transformer,
  cache: GatedCache,
  tokens: Int[Array, 'B T'],
  *,
  valid: Bool[Array, 'B T'] | None = None,
  step: Int[Array, ''] | int | None = None,
) -> GatedCache:
  """Reads more tokens of the prompts; arguments as of `cache.extend`."""
  B, T = tokens.shape
  x, below = _below(model, cache, tokens, valid, step)
  places = cache.lengths[:, None] + jnp.arange(T)
  if valid is not None:
    # Beyond the end: not written.
    places = jnp.where(valid, places, cache.outputs.shape[1])
  outputs = cache.outputs.at[jnp.arange(B)[:, None], places].set(x, mode='drop')
  return _stay(dataclasses.replace(cache, below=below, outputs=outputs))


def ask(
  model: Transformer,
  cache: GatedCache,
  *,
  step: Int[Array, ''] | int | None = None,
) -> tuple[Float[Array, 'B V'], GatedCache]:
  """Lets pass what the prompts' last tokens ask for.

  Returns:
    The logits of each row's next token, and the cache.
  """
  passed = model.gate(cache.outputs, cache.lengths - 1, answer=1)
  valid = passed.kept.places >= 0
  x, above = cache_lib.advance(
    model.blocks[model.config.gate.after :],
    cache.above,
    passed.x,
    valid=valid,
    query_indices=cache_lib.last_place(valid),
    step=step,
  )
  logits = model.logits(model.norm(x))[:, 0]
  return logits, dataclasses.replace(cache, above=above)


def extend(
  model: Transformer,
  cache: GatedCache,
  tokens: Int[Array, 'B T'],
  *,
  valid: Bool[Array, 'B T'] | None = None,
  step: Int[Array, ''] | int | None = None,
) -> tuple[Float[Array, 'B T V'], GatedCache]:
  """Reads tokens behind the question, all of which pass."""
  x, below = _below(model, cache, tokens, valid, step)
  x, above = cache_lib.advance(
    model.blocks[model.config.gate.after :],
    cache.above,
    x,
    valid=valid,
    step=step,
  )
  cache = dataclasses.replace(cache, below=below, above=above)
  return model.logits(model.norm(x)), cache


def _below(model, cache, tokens, valid, step):
  positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
  x = model.embed(tokens, positions=positions)
  blocks = model.blocks[: model.config.gate.after]
  return cache_lib.advance(blocks, cache.below, x, valid=valid, step=step)


def _stay(cache: GatedCache) -> GatedCache:
  """Keeps the outputs where they were."""
  axes = cache.below.axes
  if axes is None:
    return cache
  outputs = lax.with_sharding_constraint(cache.outputs, _of_tokens(axes))
  return dataclasses.replace(cache, outputs=outputs)


def _of_tokens(axes: Axes | None) -> NamedSharding | None:
  return None if axes is None else NamedSharding(axes.mesh, axes.spec())
