"""Block-selection attention as the equations of the papers: the oracle."""

import jax
import jax.numpy as jnp

from longctx.ops.block_selection.arguments import NSAConfig, SelectionArgs
from longctx.ops.block_selection.compression import compress
from longctx.ops.block_selection.gathered import softmax
from longctx.ops.dot_product_attention.dropout import keep_factor
from longctx.typing import Array, Bool, Float, Int


def moba(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: SelectionArgs,
  *,
  block_size: int,
  top_k: int,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """MoBA (arXiv:2502.13189), equations 2 to 6, with every score held.

  Arguments are those of `longctx.ops.block_selection.moba`.
  """
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q_pos, k_pos = args.positions(T, S)
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  same, readable, rank = _segments(q_pos, k_pos, args)

  block = jnp.arange(-(-S // block_size))
  member = (rank[..., None] // block_size == block).astype(dtype)  # B S I
  own = (readable.sum(-1) - 1) // block_size  # B T
  products = jnp.einsum('BTNH,BSNH->BNTS', q, k)
  # The mean of products is the product with the mean.
  gate = jnp.where(same[:, None], products, 0) @ member[:, None] / block_size
  gate = jnp.where(block < own[:, None, :, None], gate, -jnp.inf)
  chosen = _top(gate, top_k - 1) | (block == own[:, None, :, None])
  read = jnp.einsum('BNTI,BSI->BNTS', chosen.astype(dtype), member) > 0

  distance = abs(q_pos[:, :, None] - k_pos[:, None])[:, None]
  z = products * args.scale
  if args.alibi_slopes is not None:
    z = z - args.alibi_slopes[:, None, None] * distance
  p, lse = softmax(jnp.where(read & readable[:, None], z, -jnp.inf))
  if args.dropout is not None:
    segment = args.q_segment_ids
    p *= keep_factor(
      args.dropout,
      batch=jnp.arange(B)[:, None, None, None],
      head=jnp.arange(N)[:, None, None],
      segment=None if segment is None else segment[:, None, :, None],
      q_positions=q_pos[:, None, :, None],
      k_positions=k_pos[:, None, None],
    )
  return jnp.einsum('BNTS,BSNV->BTNV', p, v), lse.swapaxes(1, 2)


def nsa(
  q: Float[Array, 'B T N H'],
  k_compressed: Float[Array, 'B S K H'],
  v_compressed: Float[Array, 'B S K V'],
  k_selected: Float[Array, 'B S K H'],
  v_selected: Float[Array, 'B S K V'],
  args: SelectionArgs,
  config: NSAConfig,
) -> tuple[
  tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']],
  tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']],
]:
  """NSA (arXiv:2502.11089), equations 7 to 12, with every score held.

  A block is known by its first key: column s of the compressed attention is the
  block that begins at key s, and is empty where none does.
  """
  B, T, N, _ = q.shape
  S, K = k_compressed.shape[1:3]
  L, G = config.length, N // K
  stride, block_size = config.stride, config.block_size
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q_pos, k_pos = args.positions(T, S)
  keys = (k_compressed, v_compressed, k_selected, v_selected)
  q, *keys = (x.astype(dtype) for x in (q, *keys))
  kc, vc, ks, vs = keys
  same, readable, rank = _segments(q_pos, k_pos, args)
  length = readable.sum(-1)  # B T, of the segment up to the query

  # Member l of the block that begins at s: the key that is l ranks later.
  ids = args.k_segment_ids
  ids = jnp.zeros((B, S), int) if ids is None else ids
  later = rank[:, None] == rank[:, :, None] + jnp.arange(L)[:, None, None, None]
  later &= ids[:, None] == ids[:, :, None]
  members = lambda x: jnp.einsum('LBSZ,BZKH->BSLKH', later.astype(dtype), x)
  kc = compress(members(kc), config.compress_k)
  vc = compress(members(vc), config.compress_v)
  if config.rope is not None:
    kc = config.rope.rotate(kc, jnp.broadcast_to(k_pos, (B, S)))
  ends = rank[:, None] + L
  complete = same & (rank[:, None] % stride == 0) & (ends <= length[..., None])
  kc, vc, ks, vs = (jnp.repeat(x, G, axis=2) for x in (kc, vc, ks, vs))
  z = jnp.einsum('BTNH,BSNH->BNTS', q, kc) * args.scale
  p, lse = softmax(jnp.where(complete[:, None], z, -jnp.inf))
  compressed = jnp.einsum('BNTS,BSNV->BTNV', p, vc), lse.swapaxes(1, 2)

  # Equation 9, counted from 0, and equation 10: a group of heads is one.
  p = p.reshape(B, K, G, T, S).sum(2)
  starts = jnp.arange(-(-S // stride))
  p = p @ (rank[..., None] == starts * stride).astype(dtype)[:, None]
  block = jnp.arange(-(-S // block_size))
  importance = jnp.zeros((*p.shape[:3], len(block)), dtype)
  for m in range(block_size // stride):
    for n in range(L // stride):
      i = block * (block_size // stride) + m - n
      inside = (i >= 0) & (i < len(starts))
      importance += jnp.where(inside, p[..., i.clip(0, len(starts) - 1)], 0)
  own = (length - 1)[:, None, :, None] // block_size
  local = (block <= own) & (block > own - config.num_local)
  fixed = local | (block < config.num_initial) & (block <= own)
  free = jnp.where(fixed | (block > own), -jnp.inf, importance)
  chosen = _top(free, config.num_free) | fixed
  member = (rank[..., None] // block_size == block).astype(dtype)
  read = jnp.einsum('BKTI,BSI->BKTS', chosen.astype(dtype), member) > 0

  read = jnp.repeat(read & readable[:, None], G, axis=1)
  z = jnp.einsum('BTNH,BSNH->BNTS', q, ks) * args.scale
  p, lse = softmax(jnp.where(read, z, -jnp.inf))
  selected = jnp.einsum('BNTS,BSNV->BTNV', p, vs), lse.swapaxes(1, 2)
  return compressed, selected


def _segments(
  q_pos: Int[Array, 'Bq T'], k_pos: Int[Array, 'Bk S'], args: SelectionArgs
) -> tuple[Bool[Array, '_ T S'], Bool[Array, 'b T S'], Int[Array, '_ S']]:
  """Pairs of one segment, those of them to read, and each key's rank in it."""
  T, S = q_pos.shape[1], k_pos.shape[1]
  same, together = jnp.ones((1, T, S), bool), jnp.ones((1, S, S), bool)
  if args.k_segment_ids is not None:
    ids = args.k_segment_ids[:, None]
    same = args.q_segment_ids[:, :, None] == ids
    together = args.k_segment_ids[:, :, None] == ids
  place = jnp.arange(S)
  a, b = k_pos[:, :, None], k_pos[:, None]
  earlier = (b < a) | (b == a) & (place < place[:, None])
  rank = (earlier & together).sum(-1)
  return same, same & (q_pos[:, :, None] >= k_pos[:, None]), rank


def _top(x: Float[Array, '*b I'], n: int) -> Bool[Array, '*b I']:
  """The n largest numbers above -inf; of equal ones the first."""
  x = jax.lax.stop_gradient(x)
  order = jnp.argsort(jnp.argsort(-x, axis=-1, stable=True), axis=-1)
  return (order < n) & (x > -jnp.inf)
