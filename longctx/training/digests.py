"""Digests of arrays, which do not depend on how they are sharded."""

from typing import Any

import jax
import jax.numpy as jnp


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by dotted path: {'blocks.0.norm': array, ...}."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


@jax.jit
def _leaf_digest(x):
  """Two 32-bit sums of hashed (index, word) pairs, and whether x is finite.

  Each hash is a bijection of the word, so a single changed word always changes
  both sums; anything else escapes with probability 2**-64. Sums of integers do
  not depend on order, so neither does the digest on the sharding. Indices come
  from one iota per axis: flattening a sharded array would gather it.
  """
  finite = (
    jnp.all(jnp.isfinite(x))
    if jnp.issubdtype(x.dtype, jnp.inexact)
    else jnp.array(True)
  )
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  index = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index = index * jnp.uint32(size) + iota

  def total(seed):
    # The finaliser of MurmurHash3.
    z = words ^ (index * jnp.uint32(0x9E3779B1) + jnp.uint32(seed))
    z = (z ^ (z >> 16)) * jnp.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(z ^ (z >> 16), dtype=jnp.uint32)

  return total(0), total(0x6A09E667), finite


def digest(tree: Any) -> tuple[dict[str, list], list[str]]:
  """Describes each leaf as [shape, dtype, 64-bit digest].

  Returns:
    (leaves by path, paths of leaves that hold a NaN or an infinity).
  """
  leaves = flatten(tree)
  sums = {
    path: _leaf_digest(
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    )
    for path, x in leaves.items()
  }
  described, bad = {}, []
  for path, (low, high, finite) in jax.device_get(sums).items():
    leaf = leaves[path]
    value = f'{int(high):08x}{int(low):08x}'
    described[path] = [list(leaf.shape), str(leaf.dtype), value]
    if not finite:
      bad.append(path)
  return described, bad
