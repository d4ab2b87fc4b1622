"""Block-selection attention in memory O(T): choose blocks, then attend.

Choosing compares every query with one vector per block, for a few queries at a
time. It has no gradient, as in the papers; what it is made of may have one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longctx.ops.block_selection import gathered, tiles
from longctx.ops.block_selection.arguments import NSAConfig, SelectionArgs
from longctx.ops.block_selection.gathered import softmax
from longctx.ops.block_selection.segments import (
  Segments,
  complete_blocks,
  locate_segments,
  take_blocks,
)
from longctx.ops.block_selection.summaries import (
  Summary,
  moba_summaries,
  nsa_summaries,
)
from longctx.ops.block_selection.tiles import LogitModifiers
from longctx.typing import Array, Bool, Float, Int

# Scores held at once: 4 MB in float32, and those of a few queries at least.
SCORES_TOGETHER = 2**20
LEAST_QUERIES = 16


def moba(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: SelectionArgs,
  *,
  block_size: int,
  top_k: int,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """MoBA; arguments as in the reference, memory O(T).

  Time O(T top_k block_size) to attend and O(T S / block_size) to choose.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  segments = locate_segments(B, T, S, args)
  k, v = segments.sort(k), segments.sort(v)
  (summary,) = moba_summaries(block_size=block_size)
  if args.summaries is None:
    blocks = complete_blocks(segments, S, length=block_size, stride=block_size)
    means = _summarize(summary, lax.stop_gradient(k), blocks, None, dtype)
  else:
    (means,) = args.summaries
    blocks = _kept_blocks(summary, means)
  own = _own_block(segments, block_size)

  def choose(q, first, own):
    q = q.reshape(*q.shape[:2], K, N // K, H).astype(dtype)
    gate = jnp.einsum('BTKGH,BCKH->BTKGC', q, means)
    gate = gate.reshape(*gate.shape[:2], N, -1)
    past = _between(blocks, first, own)[:, :, None]
    return _top(jnp.where(past, gate, -jnp.inf), blocks, top_k - 1)

  chosen = _map_queries(
    choose,
    (lax.stop_gradient(q), segments.first, own),
    scores=B * N * blocks.shape[1],
  )
  own = jnp.broadcast_to(own[:, :, None, None], (B, T, N, 1))
  begin = jnp.concatenate([own, chosen], axis=-1)
  modifiers = None
  if args.alibi_slopes is not None or args.dropout is not None:
    q_pos, k_pos = args.positions(T, S)
    modifiers = LogitModifiers(
      jnp.broadcast_to(q_pos, (B, T)),
      jnp.broadcast_to(segments.sort(k_pos), (B, S)),
      args.q_segment_ids,
      args.alibi_slopes,
      args.dropout,
    )
  return _attend(
    q,
    k,
    v,
    begin,
    segments,
    block_size=block_size,
    scale=args.scale,
    modifiers=modifiers,
  )


def nsa(
  q: Float[Array, 'B T N H'],
  k_compressed: Float[Array, 'B S K H'] | None,
  v_compressed: Float[Array, 'B S K V'] | None,
  k_selected: Float[Array, 'B S K H'],
  v_selected: Float[Array, 'B S K V'],
  args: SelectionArgs,
  config: NSAConfig,
) -> tuple[
  tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']],
  tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']],
]:
  """NSA's first two branches; arguments as in the reference, memory O(T).

  Time O(T top_n block_size) for selected and O(T S / stride) for compressed
  attention.
  """
  B, T, N, _ = q.shape
  S, K = k_selected.shape[1:3]
  L, stride, block_size = config.length, config.stride, config.block_size
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  segments = locate_segments(B, T, S, args)
  blocks = complete_blocks(segments, S, length=block_size, stride=block_size)
  own = _own_block(segments, block_size)
  # Local blocks begin after `near`, initial ones before `far`.
  near = own - config.num_local * block_size
  far = segments.first + config.num_initial * block_size
  fixed = [own - i * block_size for i in range(config.num_local)]
  fixed = [jnp.where(x >= segments.first, x, -1) for x in fixed]
  for i in range(config.num_initial):
    x = segments.first + i * block_size
    fixed.append(jnp.where((x <= near) & (own >= 0), x, -1))
  begin = jnp.stack(fixed, axis=-1)[:, :, None]
  begin = jnp.broadcast_to(begin, (B, T, K, begin.shape[-1]))

  parts = nsa_summaries(**config._asdict())
  if args.summaries is None:
    starts = complete_blocks(segments, S, length=L, stride=stride)
    k_pos = segments.sort(args.positions(T, S)[1])
    k_pos = jnp.broadcast_to(k_pos, (B, S))
    kc, vc = (
      _summarize(part, segments.sort(x), starts, k_pos, dtype)
      for part, x in zip(parts, (k_compressed, v_compressed), strict=True)
    )
  else:
    kc, vc = args.summaries
    starts = _kept_blocks(parts[0], kc)
  before = jax.vmap(jnp.searchsorted)(starts, blocks)

  def read(q, first, last, near, far):
    ok = _between(starts, first, last - L + 2)
    out, lse, p = _compressed_attention(q, kc, vc, ok, args.scale)
    importance = _importance(p, before, L, block_size, stride)
    past = _between(blocks, far, near + 1)[:, :, None]
    importance = jnp.where(past, importance, -jnp.inf)
    return out, lse, _top(importance, blocks, config.num_free)

  out, lse, chosen = _map_queries(
    read,
    (q, segments.first, segments.last, near, far),
    scores=B * N * starts.shape[1],
  )
  begin = jnp.concatenate([begin, chosen], axis=-1)
  selected = _attend(
    q,
    segments.sort(k_selected),
    segments.sort(v_selected),
    begin,
    segments,
    block_size=block_size,
    scale=args.scale,
  )
  return (out, lse), selected


def _summarize(
  summary: Summary,
  x: Float[Array, 'B S K D'],
  begin: Int[Array, 'B C'],
  positions: Int[Array, 'B S'] | None,
  dtype: Any,
) -> Float[Array, 'B C K D']:
  """The vectors of blocks that begin at these places of sorted keys."""
  blocks = take_blocks(x, begin, summary.length).astype(dtype)
  first = begin
  if positions is not None:
    first = take_blocks(positions, begin, 1)[..., 0]
  return summary.make(blocks, first)


def _kept_blocks(
  summary: Summary, vectors: Float[Array, 'B C K D']
) -> Int[Array, 'B C']:
  """Where the blocks of kept vectors begin, complete yet or not."""
  B, C = vectors.shape[:2]
  return jnp.broadcast_to(jnp.arange(C) * summary.stride, (B, C))


def _attend(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  begin: Int[Array, 'B T M n'],
  segments: Segments,
  *,
  block_size: int,
  scale: float,
  modifiers: LogitModifiers | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Softmax attention to the blocks that begin at these places, -1 for none."""
  common = dict(block_size=block_size, scale=scale, modifiers=modifiers)
  if q.shape[1] == 1 and (modifiers is None or modifiers.dropout is None):
    return gathered.attend(q, k, v, begin, segments.last, **common)
  aligned = segments.begin is None
  return tiles.attend(q, k, v, begin, segments.last, aligned=aligned, **common)


def _compressed_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B C K H'],
  v: Float[Array, 'B C K V'],
  ok: Bool[Array, 'B T C'],
  scale: float,
) -> tuple[
  Float[Array, 'B T N V'], Float[Array, 'B T N'], Float[Array, 'B T K C']
]:
  """Softmax attention to one vector per block.

  Returns:
    out, lse, and the weights, summed over the heads of a group.
  """
  (B, T, N, H), K = q.shape, k.shape[2]
  q = q.reshape(B, T, K, N // K, H).astype(k.dtype) * scale
  z = jnp.einsum('BTKGH,BCKH->BTKGC', q, k)
  z = jnp.where(ok[:, :, None, None], z, -jnp.inf)
  p, lse = softmax(z)
  out = jnp.einsum('BTKGC,BCKV->BTKGV', p, v)
  return out.reshape(B, T, N, -1), lse.reshape(B, T, N), p.sum(3)


def _importance(
  p: Float[Array, 'B T K C'],
  before: Int[Array, 'B D'],
  L: int,
  block_size: int,
  stride: int,
) -> Float[Array, 'B T K D']:
  """The weights of the compressed blocks that lie on each of D blocks.

    importance_j = Σ_m Σ_n p[first_j + m - n], m < block_size / d and n < L / d

  Args:
    p: weights, in the order of places.
    before: compressed blocks that begin before each block.
    L: tokens of a compressed block.
    stride: d, tokens from one compressed block to the next.
  """
  ahead, behind = block_size // stride, L // stride - 1
  p = lax.stop_gradient(p)
  # Beyond the ends, and in other segments, the weights are 0.
  p = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (behind, ahead)))
  take = jax.vmap(lambda p, at: p[..., at])
  total = 0
  for offset in range(-behind, ahead):
    times = min(ahead - offset, offset + behind + 1, ahead, behind + 1)
    total += times * take(p, before + behind + offset)
  return total


def _own_block(segments: Segments, block_size: int) -> Int[Array, 'B T']:
  """Where the block of the last key begins that a query reads; -1 for none."""
  first, last = segments.first, segments.last
  begin = first + (last - first) // block_size * block_size
  return jnp.where(last < first, -1, begin)


def _between(
  x: Int[Array, 'B C'], low: Int[Array, 'B T'], high: Int[Array, 'B T']
) -> Bool[Array, 'B T C']:
  x = x[:, None]
  return (low[..., None] <= x) & (x < high[..., None])


def _top(
  scores: Float[Array, 'B T M C'], blocks: Int[Array, 'B C'], n: int
) -> Int[Array, 'B T M n']:
  """Places of the blocks of the n largest scores; -1 where they are -inf."""
  scores = lax.stop_gradient(scores)
  best, index = lax.top_k(scores, min(n, scores.shape[-1]))
  places = jax.vmap(lambda blocks, index: blocks[index])(blocks, index)
  return jnp.where(best > -jnp.inf, places, -1)


def _map_queries(
  function: Callable[..., Any], arrays: tuple[Array, ...], *, scores: int
) -> Any:
  """function(*arrays) of arrays [B, T, ...], for a few queries at a time.

  What lies between is computed anew in the backward pass.

  Args:
    function: of arrays to arrays [B, T, ...].
    arrays: per query.
    scores: that the function holds for each place of T.
  """
  B, T = arrays[0].shape[:2]
  size = min(max(SCORES_TOGETHER // max(scores, 1), LEAST_QUERIES), T)
  count = -(-T // size)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, count * size - T), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(B, count, size, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    return x.swapaxes(0, 1).reshape(B, count * size, *x.shape[3:])[:, :T]

  function = jax.checkpoint(function, prevent_cse=False)
  run = lambda arrays: function(*arrays)
  return jax.tree.map(join, lax.map(run, tuple(split(x) for x in arrays)))
