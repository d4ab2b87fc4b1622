"""Matching of models by parameters, state or FLOPs, so that costs are equal."""

import bisect
import dataclasses
import functools

import jax
from flax import nnx

from longctx.models import TransformerConfig, make_model

COSTS = ('parameters', 'state_bytes', 'flops')


def cost_of(config: TransformerConfig, cost: str, *, seq_len: int) -> int:
  """What a model takes, without making it.

  Args:
    config: with the vocabulary resolved.
    cost: 'parameters', their number; 'state_bytes', what decoding keeps for one
      sequence; 'flops' of a forward pass on it.
    seq_len: tokens of the sequence.

  Raises:
    ValueError: an unknown name.
  """
  if cost not in COSTS:
    raise ValueError(f'unknown {cost=}; known: {", ".join(COSTS)}')
  model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
  if cost == 'parameters':
    _, params = nnx.split(model, nnx.Param)
    return sum(x.size for x in jax.tree.leaves(params))
  return getattr(model, cost)(seq_len)


def match(
  config: TransformerConfig,
  *,
  like: TransformerConfig,
  cost: str,
  vary: str,
  seq_len: int,
  multiple: int = 1,
  most: int = 4096,
  tolerance: float = 0.1,
) -> TransformerConfig:
  """The config with one width such that it costs what another model does.

  Args:
    config: the model to change, with the vocabulary resolved.
    like: the model to equal.
    cost: 'parameters', 'state_bytes' or 'flops'.
    vary: the field to solve for, such as 'd_model', 'head_dim' or 'value_dim'.
      The cost must not fall where it grows.
    seq_len: tokens of a sequence, on which states and FLOPs may depend.
    multiple: what the width has to be a multiple of, as RoPE asks for 2 and
      heads of `d_model` for their number.
    most: the largest width to try.
    tolerance: relative difference of costs that is still called equal.

  Raises:
    ValueError: there is no such width; the message has the nearest.
  """
  if vary not in {field.name for field in dataclasses.fields(config)}:
    raise ValueError(f'{vary=} is no field of TransformerConfig')
  target = cost_of(like, cost, seq_len=seq_len)

  @functools.cache
  def at(count: int) -> int:
    changed = dataclasses.replace(config, **{vary: count * multiple})
    return cost_of(changed, cost, seq_len=seq_len)

  # The first width that costs at least the target, and the one before.
  counts = range(1, most // multiple)
  place = bisect.bisect_left(counts, target, key=at)
  near = {max(place, 1), place + 1}
  count = min(near, key=lambda n: abs(at(n) - target))
  found = at(count)
  if abs(found - target) > tolerance * target:
    raise ValueError(
      f'no {vary} gives {cost}={target:,}: {vary}={count * multiple} is '
      f'nearest with {found:,}; vary another width, or equal another model'
    )
  return dataclasses.replace(config, **{vary: count * multiple})
