"""Context-parallel attention on a mesh: one call, four schemes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longctx.masks import Causal, Mask
from longctx.ops.dot_product_attention import (
  BACKENDS,
  IMPLEMENTATIONS,
  AttentionArgs,
  BlockSizes,
  TokenIndices,
  choose,
  flash,
  resolve,
)
from longctx.ops.dot_product_attention.args import Integers, OutLse
from longctx.ops.merge import merge_devices
from longctx.parallel import reorder, ring, ulysses
from longctx.parallel.all_gather import gather
from longctx.parallel.axes import Axes, make_axes, make_layout
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.schedule import Ring, without_padding
from longctx.typing import Array, Float, Key

SCHEMES = ('ring', 'ulysses', 'all_gather', 'ring+ulysses')


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  scheme: str = 'ring',
  layout: str | SequenceLayout = 'zigzag',
  in_layout: bool = False,
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
  dropout: tuple[float, Key[Array, '']] | None = None,
  block_sizes: BlockSizes | None = None,
  implementation: str | None = None,
  return_lse: bool = False,
) -> (
  Float[Array, 'B T N V']
  | tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]
):
  """`ops.dot_product_attention` with the sequence spread over a mesh.

    ring          keys and values travel; any number of heads
    ulysses       all_to_all, heads for tokens; N a multiple of the axis
    all_gather    every device gets all the keys
    ring+ulysses  ring along the first of two axes, ulysses along the second

  The sequence lies along `axis`, the batch along `data` and the heads along
  `model` where the mesh has those and `axis` does not name them. With T other
  than S the queries are few: every device holds them all, reads its own keys,
  and the parts are merged (arXiv:2408.04093). Gradients of 'xla' can be
  differentiated again; a ring then keeps the keys of every hop.

  Args:
    q: queries.
    k: keys.
    v: values.
    mesh: from `parallel.make_mesh`.
    axis: of the sequence; two of them for 'ring+ulysses'.
    scheme: 'ring', 'ulysses', 'all_gather' or 'ring+ulysses'.
    layout: of the shards; its name, or with in_layout a `SequenceLayout`, which
      knows how much of the arrays is padding.
    in_layout: whether arrays come, and go, in the layout's order; otherwise in
      natural order, and they are permuted here.
    mask: as in ops, like all the following. It reads positions, which default
      to the natural ones in any layout; where any are given, the ring does not
      know which hops nobody reads, and makes them all.
    q_positions: of the queries, in the order in which they come.
    k_positions: of the keys, likewise.
    q_segment_ids: of the queries.
    k_segment_ids: of the keys.
    scale: of the products.
    logits_soft_cap: cap on the logits.
    sink_logits: counted once.
    alibi_slopes: per head.
    normalizer: of the logits.
    dropout: drops the same weights on any mesh.
    block_sizes: of the parts.
    implementation: 'xla', 'pallas' or None for 'ring', any for the others.
    return_lse: whether to return lse too.

  Returns:
    As in ops, in the order of the queries.

  Raises:
    ValueError: shapes that do not fit the mesh.
    NotImplementedError: a combination that the scheme lacks.
  """
  args = resolve(
    q,
    k,
    v,
    mask=mask,
    q_positions=q_positions,
    k_positions=k_positions,
    q_segment_ids=q_segment_ids,
    k_segment_ids=k_segment_ids,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    sink_logits=sink_logits,
    alibi_slopes=alibi_slopes,
    normalizer=normalizer,
    dropout=dropout,
    block_sizes=block_sizes,
  )
  axes = make_axes(mesh, axis)
  axes.check(batch=q.shape[0], query_heads=q.shape[2], key_heads=k.shape[2])
  layout = make_layout(
    layout, k.shape[1], axes.size(axes.seq), in_layout=in_layout
  )
  replicated = q.shape[1] != k.shape[1]
  part = args
  if scheme != 'ulysses' or replicated:
    # What devices compute is at positions of its own.
    part = args.with_indices(q_positions=layout.positions(0)[None])
  name = choose(implementation, q, k, v, part, uses_lse=return_lse)
  check_scheme(scheme, axes, q.shape[2], implementation)
  program = _Program(axes, layout, scheme, name, replicated)
  if not in_layout:
    q, k, v, args = program.pad(q, k, v, args)
  queries = axes.queries_spec(replicated=replicated)
  keys = axes.spec(heads=True)
  specs = AttentionArgs(
    args.static,
    axes.indices_spec(args.indices, q.shape[0], replicated=replicated),
    sink_logits=P(axes.heads),
    alibi_slopes=P(axes.heads),
    dropout=P(),
  )
  out, lse = jax.shard_map(
    program.local if in_layout else program.local_in_natural_order,
    mesh=mesh,
    in_specs=(queries, keys, keys, specs),
    out_specs=(queries, queries),
    check_vma=False,
  )(q, k, v, args)
  out = args.static.normalizer.finish(out, lse)
  if not in_layout and not replicated:
    out, lse = (x[:, : layout.seq_len] for x in (out, lse))
  return (out, lse) if return_lse else out


def check_scheme(
  scheme: str, axes: Axes, N: int, implementation: str | None
) -> None:
  """Raises where a scheme cannot run on a mesh.

  Raises:
    ValueError: an unknown name, axes or N heads that do not fit.
    NotImplementedError: an implementation that gives no parts to merge.
  """
  if scheme not in SCHEMES:
    raise ValueError(f'unknown {scheme=}; known: {", ".join(SCHEMES)}')
  wanted = 2 if scheme == 'ring+ulysses' else 1
  if len(axes.seq) != wanted and scheme != 'all_gather':
    raise ValueError(
      f'{scheme=} needs {wanted} mesh axes for the sequence, got {axes.seq}'
    )
  if 'ulysses' in scheme:
    here, devices = N // axes.size(axes.heads), axes.size(axes.seq[-1])
    if here % devices:
      raise ValueError(
        f'{scheme=} splits heads over the {devices} devices of '
        f'{axes.seq[-1]!r}, which must divide {here} heads; take '
        "scheme='ring', another mesh or another number of heads"
      )
  if 'ring' in scheme and implementation not in (None, *BACKENDS):
    raise NotImplementedError(
      f'{implementation=} gives no parts for a ring to merge: take None or one '
      f'of {sorted(BACKENDS)}, or another scheme'
    )


@dataclasses.dataclass(frozen=True)
class _Program:
  """Context-parallel attention, as each device runs it inside `shard_map`.

  Attributes:
    replicated: whether the queries are few and on every device.
  """

  axes: Axes
  layout: SequenceLayout
  scheme: str
  implementation: str
  replicated: bool

  def pad(
    self, q: Array, k: Array, v: Array, args: AttentionArgs
  ) -> tuple[Array, Array, Array, AttentionArgs]:
    """As long as the layout needs them, padding being a segment of its own."""
    layout, (q_at, k_at, q_ids, k_ids) = self.layout, args.indices
    if layout.is_padded and k_at is not None and k_ids is None:
      # Positions of padding mean nothing, so that segments have to keep it out.
      q_ids, k_ids = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    unused = 0
    if k_ids is not None:
      unused = jnp.maximum(q_ids.max(), k_ids.max()) + 1

    def of_keys(x, fill=0):
      return None if x is None else reorder.pad(x, layout, fill)

    of_queries = (lambda x, _=0: x) if self.replicated else of_keys
    indices = TokenIndices(
      of_queries(q_at),
      of_keys(k_at),
      of_queries(q_ids, unused),
      of_keys(k_ids, unused),
    )
    k, v = of_keys(k), of_keys(v)
    return of_queries(q), k, v, args._replace(indices=indices)

  def local_in_natural_order(
    self, q: Array, k: Array, v: Array, args: AttentionArgs
  ) -> OutLse:
    """`local` of a contiguous shard of what `pad` gives."""
    where = dict(layout=self.layout, axis=self.axes.seq)
    enter = functools.partial(reorder.into_layout, **where)
    of_queries = (lambda x: x) if self.replicated else enter
    q_at, k_at, q_ids, k_ids = args.indices
    indices = TokenIndices(
      of_queries(q_at), enter(k_at), of_queries(q_ids), enter(k_ids)
    )
    args = args._replace(indices=indices)
    out = self.local(of_queries(q), enter(k), enter(v), args)
    return out if self.replicated else reorder.into_natural(out, **where)

  def local(
    self,
    q: Float[Array, 'B L N H'],
    k: Float[Array, 'B M K H'],
    v: Float[Array, 'B M K V'],
    args: AttentionArgs,
  ) -> OutLse:
    """One device's part."""
    axes, scheme = self.axes, self.scheme
    args = args._replace(dropout=axes.own_dropout(args.dropout, q))
    args = args.with_block_sizes(sharing=axes.sharing)
    if self.replicated:
      return self._replicated_queries(q, k, v, args)
    if scheme == 'all_gather':
      return self._all_gather(q, k, v, args)
    if scheme == 'ulysses':
      inner = self._in_natural_order
    else:
      args = self._without_padding(args)
      fold = axes.size(axes.seq[1]) if scheme == 'ring+ulysses' else 1
      inner = functools.partial(
        ring.attend,
        axis=axes.seq[0],
        ring=Ring(self.layout, fold),
        backend=BACKENDS[self.implementation],
      )
    if scheme == 'ring':
      return inner(q, k, v, args)
    axis = axes.seq[-1]
    return ulysses.attend(q, k, v, args, inner, axis=axis, size=axes.size(axis))

  def _without_padding(self, args: AttentionArgs) -> AttentionArgs:
    """Keeps padding at natural positions out."""
    if args.indices.k_positions is not None:
      return args
    natural = args.indices.q_positions is None
    mask = without_padding(args.static.mask, self.layout, natural=natural)
    return args.with_static(mask=mask)

  def _replicated_queries(
    self, q: Array, k: Array, v: Array, args: AttentionArgs
  ) -> OutLse:
    """Queries that every device has, to its own keys; parts are merged."""
    axes, sink_logits = self.axes, args.sink_logits
    args = self._without_padding(args)._replace(sink_logits=None)
    if args.indices.k_positions is None:
      positions = self.layout.positions(axes.index(axes.seq))[None]
      args = args.with_indices(k_positions=positions)
    out, lse = IMPLEMENTATIONS[self.implementation](q, k, v, args)
    wide, lse = merge_devices(out.astype(lse.dtype), lse, axis=axes.seq)
    out = wide.astype(out.dtype)
    if sink_logits is None:
      return out, lse
    return flash.add_sink(out, lse, sink_logits)

  def _all_gather(
    self, q: Array, k: Array, v: Array, args: AttentionArgs
  ) -> OutLse:
    """This device's queries, to all the keys in natural order."""
    axis, layout, indices = self.axes.seq, self.layout, args.indices
    of_all = functools.partial(gather, axis=axis, layout=layout)
    q_positions = indices.q_positions
    if q_positions is None:
      q_positions = layout.positions(self.axes.index(axis))[None]
    args = args.with_indices(
      q_positions=q_positions,
      k_positions=of_all(indices.k_positions),
      k_segment_ids=of_all(indices.k_segment_ids),
    )
    if layout.name == 'zigzag':
      # Not for the keys, but a block size serves both.
      args = args.with_block_sizes(contiguous_len=layout.span_len)
    attend = IMPLEMENTATIONS[self.implementation]
    return attend(q, of_all(k), of_all(v), args)

  def _in_natural_order(
    self, q: Array, k: Array, v: Array, args: AttentionArgs
  ) -> OutLse:
    """Attention of whole sequences that come, and go, in the layout's order."""
    restore = functools.partial(self.layout.restore, local=True)
    q, k, v, indices = jax.tree.map(restore, (q, k, v, args.indices))
    attend = IMPLEMENTATIONS[self.implementation]
    out, lse = attend(q, k, v, args._replace(indices=indices))
    return tuple(self.layout.apply(x, local=True) for x in (out, lse))
