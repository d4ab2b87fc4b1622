"""Block-selection attention (MoBA, NSA): each query chooses blocks of keys."""

from typing import Any

import numpy as np

from longctx.ops.block_selection import blockwise, reference
from longctx.ops.block_selection.arguments import NSAConfig, SelectionArgs
from longctx.ops.block_selection.compression import Compression
from longctx.ops.block_selection.summaries import (
  Summary,
  moba_summaries,
  nsa_summaries,
)
from longctx.ops.dot_product_attention import Dropout, resolve
from longctx.ops.rope import Rope
from longctx.typing import Array, Float, Int, Key

__all__ = [
  'IMPLEMENTATIONS',
  'Compression',
  'Summary',
  'moba',
  'moba_summaries',
  'nsa',
  'nsa_summaries',
]

# Modules with a `moba` and an `nsa`.
IMPLEMENTATIONS = {'reference': reference, 'xla': blockwise}

Integers = Int[Array, '...'] | Int[np.ndarray, '...']
Result = Float[Array, 'B T N V'] | tuple[Array, Array]


def moba(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  block_size: int,
  top_k: int,
  q_positions: Integers | None = None,
  k_positions: Integers | None = None,
  q_segment_ids: Integers | None = None,
  k_segment_ids: Integers | None = None,
  scale: float | None = None,
  alibi_slopes: Float[Array, ' N'] | Float[np.ndarray, ' N'] | None = None,
  dropout: tuple[float, Key[Array, '']] | Dropout | None = None,
  summaries: tuple[Float[Array, 'B C K H'], ...] | None = None,
  implementation: str | None = None,
  return_lse: bool = False,
) -> Result:
  """Causal attention to the block of the query and those that fit it best.

    gate_ti = q_t · mean of the keys of block i
    out_t = softmax over the keys s ≤ t of the query's own block and of the
            top_k - 1 blocks before it with the largest gates

  MoBA (arXiv:2502.13189). Every query head chooses for itself; of equal gates
  the earlier block's counts more; where fewer blocks lie before the query, it
  reads them all. The choice has no gradient.

  Blocks are those of a segment, counted from its first key in the order of
  positions: packed segments have the blocks that they have on their own. A
  query's own block is that of the last key that it may read.

  Time O(T top_k block_size) to attend and O(T S / block_size) to choose; memory
  O(T + S).

  Args:
    q: queries.
    k: keys; K divides N, and neighbouring query heads share a key head.
    v: values, of any width V.
    block_size: keys of a block; the last one of a segment may have fewer.
    top_k: blocks that a query reads, its own included.
    q_positions: int [T] or [B, T]; 0 to T - 1 when None.
    k_positions: int [S] or [B, S]; 0 to S - 1 when None.
    q_segment_ids: int [B, T]; a query reads keys of its own segment alone.
    k_segment_ids: int [B, S]; those of the queries when None and T = S.
    scale: of the products q · k; H**-0.5 when None.
    alibi_slopes: per head; of the logits, not of the gates.
    dropout: (rate, key) of the weights, as in `ops.dot_product_attention`.
    summaries: of the blocks from the first on, where a decoder keeps those of
      `moba_summaries` for keys at their natural positions; None: made here.
      Those that are not complete yet may be anything.
    implementation: 'reference' (memory B N T S), 'xla', or None for the best.
    return_lse: whether to return lse too.

  Returns:
    out in the dtype of q, zero where there is nothing to read; with
    `return_lse` also lse in float32 (float64 for float64 inputs).

  Raises:
    ValueError: shapes that do not fit together, an unknown name.
  """
  _at_least_one(block_size=block_size, top_k=top_k)
  args = _resolve(
    q,
    k,
    v,
    q_positions=q_positions,
    k_positions=k_positions,
    q_segment_ids=q_segment_ids,
    k_segment_ids=k_segment_ids,
    scale=scale,
    alibi_slopes=alibi_slopes,
    dropout=dropout,
    summaries=summaries,
  )
  _check_summaries(args, moba_summaries(block_size=block_size), implementation)
  out, lse = _implementation(implementation).moba(
    q, k, v, args, block_size=block_size, top_k=top_k
  )
  out = out.astype(q.dtype)
  return (out, lse) if return_lse else out


def nsa(
  q: Float[Array, 'B T N H'],
  k_compressed: Float[Array, 'B S K H'] | None,
  v_compressed: Float[Array, 'B S K V'] | None,
  k_selected: Float[Array, 'B S K H'],
  v_selected: Float[Array, 'B S K V'],
  *,
  compress_k: Compression,
  compress_v: Compression,
  stride: int,
  block_size: int,
  top_n: int,
  num_initial: int = 1,
  num_local: int = 2,
  rope: Rope | None = None,
  q_positions: Integers | None = None,
  k_positions: Integers | None = None,
  q_segment_ids: Integers | None = None,
  k_segment_ids: Integers | None = None,
  scale: float | None = None,
  summaries: tuple[Float[Array, 'B C K _'], ...] | None = None,
  implementation: str | None = None,
  return_lse: bool = False,
) -> tuple[Result, Result]:
  """Causal attention to compressed blocks, and to the blocks that it points at.

    c_i = φ(tokens i d, …, i d + L - 1)             for keys and for values
    p_ti = softmax_i(scale q_t · c_i) over blocks that end at or before t
    compressed_t = Σ_i p_ti c_i
    importance_tj = Σ p_ti, over heads of a group and the strides of c_i in j
    selected_t = softmax over the keys s ≤ t of top_n blocks of block_size keys:
                 the first, those up to the query, and the most important

  Native Sparse Attention (arXiv:2502.11089), equations 7 to 12, without its
  sliding window and the gates. All query heads of a key head share the blocks.
  Gradients reach q, the keys, the values and the weights of the compressions;
  the choice has none. Segments are as in `moba`, for both kinds of blocks.

  Time O(T S / stride) and O(T top_n block_size); memory O(T + S).

  Args:
    q: queries, rotated where positions are.
    k_compressed: keys for the compression, not rotated; None where summaries
      are given.
    v_compressed: values for it, likewise.
    k_selected: keys of the selected branch, rotated where positions are.
    v_selected: values of it.
    compress_k: φ of the keys, of blocks of L tokens.
    compress_v: φ of the values.
    stride: d, from one compressed block to the next; divides L and block_size.
    block_size: keys of a selected block.
    top_n: blocks that a query reads, initial and local ones included.
    num_initial: first blocks of a segment, always read.
    num_local: last blocks up to the query's own, always read.
    rope: rotates a compressed key by its first token's position; None:
      does not.
    q_positions: as in `moba`, like the next ones.
    scale: of the products, in both branches.
    summaries: compressed keys and values that a decoder keeps, as in `moba`,
      of `nsa_summaries`.
    implementation: 'reference', 'xla' or None.
    return_lse: whether a branch is (out, lse).

  Returns:
    compressed and selected, each as in `moba`.

  Raises:
    ValueError: shapes or sizes that do not fit together, an unknown name.
  """
  _at_least_one(stride=stride, block_size=block_size, num_local=num_local)
  config = NSAConfig(
    compress_k,
    compress_v,
    stride,
    block_size,
    top_n,
    num_initial,
    num_local,
    rope,
  )
  L = config.length
  if L % stride or block_size % stride:
    raise ValueError(
      f'{stride=} must divide the {L} tokens of a compressed block and '
      f'{block_size=}'
    )
  if num_initial < 0 or config.num_free < 0:
    raise ValueError(
      f'{top_n=} must be at least {num_initial=} + {num_local=}, which are '
      'always read'
    )
  pairs = [(k_selected, v_selected)]
  if summaries is None:
    if k_compressed is None or v_compressed is None:
      raise ValueError('give k_compressed and v_compressed, or summaries')
    pairs.append((k_compressed, v_compressed))
    if k_selected.shape != k_compressed.shape:
      raise ValueError(f'{k_selected.shape=} must be {k_compressed.shape=}')
  args, *_ = (
    _resolve(
      q,
      k,
      v,
      q_positions=q_positions,
      k_positions=k_positions,
      q_segment_ids=q_segment_ids,
      k_segment_ids=k_segment_ids,
      scale=scale,
      summaries=summaries,
    )
    for k, v in pairs
  )
  v_width = v_selected if v_compressed is None else v_compressed
  for name, weights, width in (
    ('compress_k', compress_k, q.shape[-1]),
    ('compress_v', compress_v, v_width.shape[-1]),
  ):
    F = weights.outer.shape[0]
    shapes = tuple(w.shape for w in weights)
    if shapes != ((L, width), (L, width, F), (F, width)):
      raise ValueError(
        f'{name} has {shapes=}, which must be (L, H), (L, H, F) and (F, H) '
        f'with {L=} and H={width}'
      )
  _check_summaries(args, nsa_summaries(**config._asdict()), implementation)
  branches = _implementation(implementation).nsa(
    q, k_compressed, v_compressed, k_selected, v_selected, args, config
  )
  branches = [(out.astype(q.dtype), lse) for out, lse in branches]
  return tuple(x if return_lse else x[0] for x in branches)


def _resolve(
  q: Array,
  k: Array,
  v: Array,
  *,
  summaries: tuple[Array, ...] | None,
  **call: Any,
) -> SelectionArgs:
  """The checked arguments of an implementation, defaults filled in."""
  args = resolve(q, k, v, **call)
  return SelectionArgs(
    *args.indices,
    args.static.scale,
    args.alibi_slopes,
    args.dropout,
    summaries,
  )


def _check_summaries(
  args: SelectionArgs,
  expected: tuple[Summary, ...],
  implementation: str | None,
) -> None:
  """Refuses summaries that are not of these keys, or have no use."""
  if args.summaries is None:
    return
  if len(args.summaries) != len(expected):
    raise ValueError(
      f'{len(args.summaries)=} must be {len(expected)}, one for each of '
      f'{expected}'
    )
  moved = [
    name
    for name in ('k_positions', 'k_segment_ids')
    if getattr(args, name) is not None
  ]
  if moved:
    raise ValueError(
      'summaries are of keys at their natural positions in one segment: leave '
      f'out {" and ".join(moved)}, or the summaries'
    )
  if implementation == 'reference':
    raise NotImplementedError(
      "implementation='reference' makes summaries itself: give none, or take "
      "implementation='xla'"
    )


def _implementation(name: str | None) -> Any:
  name = 'xla' if name is None else name
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f'unknown implementation {name!r}; known: {sorted(IMPLEMENTATIONS)}'
    )
  return IMPLEMENTATIONS[name]


def _at_least_one(**sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f'{name}={size} must be at least 1')
