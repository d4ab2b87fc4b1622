"""Memory capacity: key-value pairs that a state answers, without training.

    memory = linear_memory(make_feature_map('identity'))
    accuracy(memory, num_pairs=16, key_dim=16, value_dim=64)

Random unit keys, each with one of a set of random codewords as its value, are
written in one pass by the op of a variant and read by key; the codeword most
like the output is the answer. What is left of a trained layer is its memory: no
projections, no gates, and keys that have not been learned.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longctx import masks
from longctx.ops.dot_product_attention import dot_product_attention
from longctx.ops.recurrence import gated_delta_rule, linear_attention
from longctx.ops.recurrence.feature_maps import FeatureMap
from longctx.typing import Array, Float

# (keys, values) -> what the memory answers to each key.
Memory = Callable[
  [Float[Array, 'B T 1 H'], Float[Array, 'B T 1 V']], Float[Array, 'B T 1 V']
]


def linear_memory(phi: FeatureMap, *, length: float = 1.0) -> Memory:
  """The state Σ φ(k) vᵀ, read by φ(k).

  Args:
    phi: a feature map without parameters or positions.
    length: of the keys before φ, which maps that are not homogeneous see.
  """

  def memory(keys, values):
    q = phi(length * keys, is_query=True)
    k = phi(length * keys, is_query=False)
    # One step after the other: a few tokens are not worth chunks.
    _, state = linear_attention(q, k, values, implementation='reference')
    return jnp.einsum('BTNP,BNPV->BTNV', q, state)

  return memory


def delta_memory(*, beta: float = 1.0) -> Memory:
  """The state of the delta rule, which replaces what it held for a key."""

  def memory(keys, values):
    betas = jnp.full(keys.shape[:3], beta, keys.dtype)
    _, state = gated_delta_rule(
      keys, keys, values, betas, implementation='reference'
    )
    return jnp.einsum('BTNH,BNHV->BTNV', keys, state)

  return memory


def softmax_memory(*, scale: float) -> Memory:
  """Every key and value, read by softmax over scale · (key · key)."""

  def memory(keys, values):
    return dot_product_attention(
      keys, keys, values, mask=masks.Full(), scale=scale
    )

  return memory


def accuracy(
  memory: Memory,
  *,
  num_pairs: int,
  key_dim: int,
  value_dim: int,
  num_values: int = 128,
  trials: int = 64,
  seed: int = 0,
) -> float:
  """Share of the keys that are answered with their own codeword.

  Args:
    memory: what is written and read.
    num_pairs: written, all of which are asked.
    key_dim: of the keys, which are uniform on the sphere.
    value_dim: of the codewords, likewise.
    num_values: codewords, of which the pairs have different ones.
    trials: memories that are filled, each with keys and codewords of its own.
    seed: of all draws.

  Raises:
    ValueError: there are fewer codewords than pairs.
  """
  if num_pairs > num_values:
    raise ValueError(f'{num_pairs=} must be at most {num_values=}')
  rng = np.random.default_rng([seed, num_pairs, key_dim, value_dim])
  keys = _unit(rng, (trials, num_pairs, key_dim))
  codes = _unit(rng, (trials, num_values, value_dim))
  out = memory(keys[:, :, None], codes[:, :num_pairs, None])[:, :, 0]
  answers = jnp.argmax(jnp.einsum('BTV,BWV->BTW', out, codes), axis=-1)
  return float(jnp.mean(answers == jnp.arange(num_pairs)))


def _unit(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
  x = rng.standard_normal(shape)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  return jnp.asarray(x, jnp.float32)


def best_accuracy(memories: Sequence[Memory], **kwargs) -> float:
  """The largest of `accuracy`, as of keys whose length serves a map best."""
  return max(accuracy(memory, **kwargs) for memory in memories)


def capacity(
  pairs: Sequence[int], accuracies: Sequence[float], *, level: float = 0.9
) -> float:
  """Pairs up to which a memory answers at least `level`, interpolated.

  Linear between two numbers of pairs, and below the first one to no pairs, of
  which all would be answered. A memory that never falls below the level has the
  last number.
  """
  before, reached = 0.0, 1.0
  for n, value in zip(pairs, accuracies, strict=True):
    if value < level:
      return before + (n - before) * (reached - level) / (reached - value)
    before, reached = float(n), value
  return before


def most_recalled(
  pairs: Sequence[int], accuracies: Sequence[float], *, chance: float
) -> float:
  """The most pairs that a memory recalls at once, under any load.

    max_n n (accuracy(n) - chance) / (1 - chance)

  A pair that is known takes -log2(chance) bits, and one that is not is answered
  by chance: this is what the memory holds, in units of a pair. Unlike
  `capacity` it counts what an overloaded memory still answers.
  """
  known = [
    n * (accuracy - chance) / (1 - chance)
    for n, accuracy in zip(pairs, accuracies, strict=True)
  ]
  return max(0.0, *known)


def measured_capacity(
  memory: Memory, pairs: Sequence[int], *, level: float = 0.9, **kwargs
) -> float:
  """`capacity` from `accuracy` at each number of pairs."""
  measure = functools.partial(accuracy, memory, **kwargs)
  return capacity(pairs, [measure(num_pairs=n) for n in pairs], level=level)
