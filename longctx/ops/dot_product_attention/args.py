"""Attention arguments: one frozen object from the public call to a kernel."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.masks import Causal, Mask, check_mask
from longctx.ops.dot_product_attention.dropout import Dropout, make_dropout
from longctx.ops.dot_product_attention.normalizers import (
  NORMALIZERS,
  Normalizer,
)
from longctx.ops.dot_product_attention.tiling import BlockSizes
from longctx.typing import Array, Float, Int, Key, check_floats

Integers = Int[Array, '...'] | Int[np.ndarray, '...']

# What implementations return, (out, lse), and (dq, dk, dv).
OutLse = tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]
Gradients = tuple[
  Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]


class TokenIndices(NamedTuple):
  """Positions and segment ids, which decide who reads whom.

  None where the default holds: natural positions, one segment.
  """

  q_positions: Int[Array, 'Bq T'] | None = None
  k_positions: Int[Array, 'Bk S'] | None = None
  q_segment_ids: Int[Array, 'B T'] | None = None
  k_segment_ids: Int[Array, 'B S'] | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticArgs:
  """The part of `AttentionArgs` that a program is compiled for."""

  mask: Mask
  scale: float
  logits_soft_cap: float | None
  normalizer: Normalizer
  block_sizes: BlockSizes


class AttentionArgs(NamedTuple):
  """Arguments of attention beside q, k and v, checked, defaults filled in.

  A pytree whose leaves are arrays: it passes whole through `jit`, `shard_map`
  and custom derivatives. See `ops.dot_product_attention` for what they mean.
  """

  static: StaticArgs
  indices: TokenIndices = TokenIndices()
  sink_logits: Float[Array, ' N'] | None = None
  alibi_slopes: Float[Array, ' N'] | None = None
  dropout: Dropout | None = None

  def with_static(self, **changes: Any) -> 'AttentionArgs':
    return self._replace(static=dataclasses.replace(self.static, **changes))

  def with_block_sizes(self, **changes: Any) -> 'AttentionArgs':
    sizes = dataclasses.replace(self.static.block_sizes, **changes)
    return self.with_static(block_sizes=sizes)

  def with_indices(self, **changes: Integers | None) -> 'AttentionArgs':
    return self._replace(indices=self.indices._replace(**changes))


def resolve(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask = Causal(),
  q_positions: Integers | None = None,
  k_positions: Integers | None = None,
  q_segment_ids: Integers | None = None,
  k_segment_ids: Integers | None = None,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  sink_logits: Float[Array, ' N'] | None = None,
  alibi_slopes: Float[Array, ' N'] | Float[np.ndarray, ' N'] | None = None,
  normalizer: str = 'softmax',
  dropout: tuple[float, Key[Array, '']] | Dropout | None = None,
  block_sizes: BlockSizes | None = None,
) -> AttentionArgs:
  """The arguments of `ops.dot_product_attention`, as implementations take them.

  What an implementation returns is still to be given to `Normalizer.finish`.

  Raises:
    ValueError: shapes that do not fit together, an unknown name.
    NotImplementedError: sinks where there is no softmax.
  """
  _check_arrays(q, k, v)
  B, T, N, H = q.shape
  S = k.shape[1]
  at_zero = q_positions is None and k_positions is None
  check_mask(mask, *((T, S) if at_zero else (max(T, S),)))
  if normalizer not in NORMALIZERS:
    raise ValueError(f'unknown {normalizer=}; known: {sorted(NORMALIZERS)}')
  if k_segment_ids is None and T == S:
    k_segment_ids = q_segment_ids
  if (q_segment_ids is None) != (k_segment_ids is None):
    raise ValueError(
      'give both q_segment_ids and k_segment_ids, or neither; got '
      f'{q_segment_ids is not None=}, {k_segment_ids is not None=}, {T=}, {S=}'
    )
  if logits_soft_cap is not None and logits_soft_cap <= 0:
    raise ValueError(f'{logits_soft_cap=} must be positive, or None')
  if alibi_slopes is not None:
    alibi_slopes = _per_head('alibi_slopes', jnp.asarray(alibi_slopes), N)
    alibi_slopes = jax.lax.stop_gradient(alibi_slopes)
  if sink_logits is not None and not NORMALIZERS[normalizer].has_sink:
    raise NotImplementedError(
      f'sink_logits take their share of a softmax, and {normalizer=} is none: '
      "leave them out, or take 'softmax'"
    )
  if sink_logits is not None:
    sink_logits = _per_head('sink_logits', sink_logits, N)
  if NORMALIZERS[normalizer].start:
    one = jnp.zeros(N, jnp.promote_types(q.dtype, jnp.float32))
    sink_logits = one if sink_logits is None else jnp.logaddexp(sink_logits, 0)
  return AttentionArgs(
    StaticArgs(
      mask,
      H**-0.5 if scale is None else scale,
      logits_soft_cap,
      NORMALIZERS[normalizer],
      block_sizes or BlockSizes(),
    ),
    TokenIndices(
      _indices('q_positions', q_positions, (1, B), T),
      _indices('k_positions', k_positions, (1, B), S),
      _indices('q_segment_ids', q_segment_ids, (B,), T),
      _indices('k_segment_ids', k_segment_ids, (B,), S),
    ),
    sink_logits,
    alibi_slopes,
    make_dropout(dropout),
  )


def _check_arrays(q: Array, k: Array, v: Array) -> None:
  """Raises where q, k and v do not fit together."""
  check_floats(q=q, k=k, v=v)
  shapes = f'{q.shape=}, {k.shape=}, {v.shape=}'
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(f'q, k and v need 4 axes, BTNH and BSKH: {shapes}')
  if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
    raise ValueError(f'B, S and K must agree between q, k and v: {shapes}')
  if q.shape[3] != k.shape[3]:
    raise ValueError(f'q and k must have the same head dim: {shapes}')
  N, K = q.shape[2], k.shape[2]
  if K == 0 or N % K:
    raise ValueError(f'{N=} query heads must be a multiple of {K=} key heads')
  if 0 in q.shape or 0 in v.shape:
    raise ValueError(f'no axis may be empty: {shapes}')


def _per_head(name: str, x: Array, N: int) -> Float[Array, ' N']:
  if x.shape != (N,):
    raise ValueError(
      f'{name} must have one entry per query head, {N=}: {x.shape=}'
    )
  return x


def _indices(
  name: str, x: Integers | None, batches: tuple[int, ...], length: int
) -> Int[Array, 'b length'] | None:
  """An integer array with a batch axis of one of the sizes given."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim == 1 and 1 in batches:
    x = x[None]
  if x.ndim != 2 or x.shape[0] not in batches or x.shape[1] != length:
    raise ValueError(
      f'{name} must have {length=} and batch size {batches[-1]}: {x.shape=}'
    )
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} must be integers: {x.dtype=}')
  return x
