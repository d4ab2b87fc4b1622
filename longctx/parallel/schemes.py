"""Dot-product attention on a mesh: one call, four schemes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longctx.masks import Causal, Mask
from longctx.ops.dot_product_attention import (
  IMPLEMENTATIONS,
  NORMALIZERS,
  BlockSizes,
  choose,
  resolve,
  xla,
)
from longctx.ops.merge import merge_devices
from longctx.parallel import ring, ulysses
from longctx.parallel.all_gather import gather
from longctx.parallel.axes import Axes, make_axes, make_layout
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.schedule import Ring, without_padding
from longctx.typing import Array, Float, Int, Key

SCHEMES = ('ring', 'ulysses', 'all_gather', 'ring+ulysses')

# Integer arguments of an implementation, per token.
INDICES = ('q_positions', 'k_positions', 'q_segment_ids', 'k_segment_ids')

Integers = Int[Array, '...'] | Int[np.ndarray, '...']


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
  and the parts are merged (arXiv:2408.04093). Gradients can be differentiated
  again; a ring then keeps the keys of every hop.

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
      to the natural ones in any layout.
    q_positions: int [T] or [B, T]. Where positions are given, the ring does not
      know which hops nobody reads, and makes them all.
    k_positions: int [S] or [B, S].
    q_segment_ids: int [B, T].
    k_segment_ids: int [B, S].
    scale: of the products.
    logits_soft_cap: cap on the logits.
    sink_logits: a logit per head, counted once.
    alibi_slopes: per head.
    normalizer: 'softmax', 'softmax1', 'softpick' or 'sigmoid'.
    dropout: (rate, key); drops the same weights on any mesh.
    block_sizes: of the parts.
    implementation: 'xla', 'pallas' or None for 'ring', any for the others.
    return_lse: whether to return lse too.

  Returns:
    As in ops, in the order of the queries.

  Raises:
    ValueError: shapes that do not fit the mesh.
    NotImplementedError: a combination that the scheme lacks.
  """
  call = resolve(
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
    implementation=implementation,
  )
  replicated = q.shape[1] != k.shape[1]
  axes = make_axes(mesh, axis)
  axes.check(batch=q.shape[0], query_heads=q.shape[2], key_heads=k.shape[2])
  check_scheme(scheme, axes, q.shape[2], implementation)
  layout = make_layout(
    layout, k.shape[1], axes.size(axes.seq), in_layout=in_layout
  )
  if not in_layout:
    q, k, v, call = _into_layout(layout, q, k, v, call, replicated=replicated)
  sink_logits = call.pop('sink_logits')
  if scheme != 'ulysses' or replicated:
    # What devices compute is a part, at positions of its own, to be merged.
    call_of_device = {**call, 'q_positions': np.arange(0)}
  else:
    call_of_device = call
  uses_lse = return_lse or sink_logits is not None
  name = choose(implementation, q, k, v, uses_lse=uses_lse, **call_of_device)
  plan = _Plan(axes, layout, scheme, name, replicated)
  out, lse = _on_mesh(plan, q, k, v, call)
  out = NORMALIZERS[normalizer].finish(out, lse)
  if sink_logits is not None:
    out, lse = xla.add_sink(out, lse, sink_logits)
  if not in_layout and not replicated:
    out, lse = layout.restore(out), layout.restore(lse)
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
        f"{axes.seq[-1]!r}, and {here} do not divide; take scheme='ring', "
        'another mesh or another number of heads'
      )
  if 'ring' in scheme and implementation not in (None, *ring.PARTS):
    raise NotImplementedError(
      f'{implementation=} gives no parts for a ring to merge: take None or one '
      f'of {sorted(ring.PARTS)}, or another scheme'
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How a call runs.

  Attributes:
    replicated_queries: whether the queries are few and on every device.
  """

  axes: Axes
  layout: SequenceLayout
  scheme: str
  implementation: str
  replicated_queries: bool


def _into_layout(layout, q, k, v, call, *, replicated: bool):
  """The arrays in the layout's order, padding being a segment of its own."""
  call = dict(call)
  if layout.is_padded and call['k_positions'] is not None:
    # Positions of padding mean nothing, so that segments have to keep it out.
    for name, x in (('q_segment_ids', q), ('k_segment_ids', k)):
      if call[name] is None:
        call[name] = jnp.zeros(x.shape[:2], jnp.int32)
  unused = 0
  if call['k_segment_ids'] is not None:
    ids = (call['q_segment_ids'], call['k_segment_ids'])
    unused = jnp.maximum(*(x.max() for x in ids)) + 1
  for name in INDICES:
    if call[name] is not None and not (replicated and name.startswith('q_')):
      fill = unused if 'segment' in name else 0
      call[name] = layout.apply(call[name], fill=fill)
  k, v = layout.apply(k), layout.apply(v)
  return (q if replicated else layout.apply(q)), k, v, call


def _on_mesh(plan: _Plan, q, k, v, call: dict[str, Any]):
  """(out, lse) of arrays in the layout's order."""
  axes = plan.axes
  rows = (
    P(axes.data, None, axes.heads)
    if plan.replicated_queries
    else axes.spec(heads=True)
  )
  static = {n: call[n] for n in ('mask', 'scale', 'logits_soft_cap')}
  static |= {n: call[n] for n in ('normalizer', 'block_sizes')}
  arrays = {n: call[n] for n in (*INDICES, 'alibi_slopes', 'dropout')}

  def spec(name, x):
    if name == 'alibi_slopes':
      return P(axes.heads)
    if name == 'dropout':
      return P()
    seq = (
      None if plan.replicated_queries and name.startswith('q_') else axes.seq
    )
    return P(axes.data if x.shape[0] == q.shape[0] else None, seq)

  specs = {
    name: None if x is None else spec(name, x) for name, x in arrays.items()
  }
  keys = axes.spec(heads=True)

  def local(q, k, v, arrays):
    return _local(plan, q, k, v, {**static, **arrays})

  return jax.shard_map(
    local,
    mesh=axes.mesh,
    in_specs=(rows, keys, keys, specs),
    out_specs=(rows, rows),
    check_vma=False,
  )(q, k, v, arrays)


def _local(plan: _Plan, q, k, v, call: dict[str, Any]):
  """One device's part of `_on_mesh`."""
  axes, layout = plan.axes, plan.layout
  if call['dropout'] is not None:
    call['dropout'] = call['dropout']._replace(
      first_batch_row=axes.index(axes.data) * q.shape[0],
      first_head=axes.index(axes.heads) * q.shape[2],
    )
  sizes = call['block_sizes'] or BlockSizes()
  call['block_sizes'] = dataclasses.replace(sizes, sharing=axes.sharing)
  if plan.replicated_queries:
    return _few_queries(plan, q, k, v, call)
  if plan.scheme == 'all_gather':
    return _all_gather(plan, q, k, v, call)
  call = _without_padding(layout, call) if 'ring' in plan.scheme else call
  if plan.scheme == 'ring':
    return ring.attend(
      q,
      k,
      v,
      axis=axes.seq[0],
      ring=Ring(layout),
      implementation=plan.implementation,
      **call,
    )
  indices = {name: call.pop(name) for name in INDICES}
  heads = {name: call.pop(name) for name in ('alibi_slopes', 'dropout')}
  if plan.scheme == 'ulysses':
    inner = functools.partial(_in_natural_order, plan, **call)
  else:
    folded = Ring(layout, fold=axes.size(axes.seq[1]))
    inner = functools.partial(
      ring.attend,
      axis=axes.seq[0],
      ring=folded,
      implementation=plan.implementation,
      **call,
    )
  size, axis = axes.size(axes.seq[-1]), axes.seq[-1]
  return ulysses.attend(
    q, k, v, inner, axis=axis, size=size, indices=indices, **heads
  )


def _without_padding(
  layout: SequenceLayout, call: dict[str, Any]
) -> dict[str, Any]:
  """Keeps padding at natural positions out."""
  if call['k_positions'] is not None:
    return call
  natural = call['q_positions'] is None
  mask = without_padding(call['mask'], layout, natural=natural)
  return {**call, 'mask': mask}


def _few_queries(plan: _Plan, q, k, v, call: dict[str, Any]):
  """Queries that every device has, to its own keys; parts are merged."""
  call = _without_padding(plan.layout, call)
  if call['k_positions'] is None:
    shard = plan.axes.index(plan.axes.seq)
    call['k_positions'] = plan.layout.positions(shard)[None]
  attend = IMPLEMENTATIONS[plan.implementation]
  out, lse = attend(q, k, v, sink_logits=None, **call)
  wide = out.astype(lse.dtype)
  wide, lse = merge_devices(wide, lse, axis=plan.axes.seq)
  return wide.astype(out.dtype), lse


def _all_gather(plan: _Plan, q, k, v, call: dict[str, Any]):
  """This device's queries, to all the keys in natural order."""
  axis, layout = plan.axes.seq, plan.layout
  for name in ('k_positions', 'k_segment_ids'):
    call[name] = gather(call[name], axis=axis, layout=layout)
  if call['q_positions'] is None:
    call['q_positions'] = layout.positions(plan.axes.index(axis))[None]
  sizes = call['block_sizes'] or BlockSizes()
  if layout.name == 'zigzag':
    # Not for the keys, but a block size serves both.
    sizes = dataclasses.replace(sizes, contiguous_len=layout.span_len)
  call['block_sizes'] = sizes
  k, v = (gather(x, axis=axis, layout=layout) for x in (k, v))
  return IMPLEMENTATIONS[plan.implementation](q, k, v, sink_logits=None, **call)


def _in_natural_order(plan: _Plan, q, k, v, **call):
  """Attention of whole sequences that come, and go, in the layout's order."""
  layout = plan.layout
  indices = {
    name: None if x is None else layout.restore(x)
    for name, x in call.items()
    if name in INDICES
  }
  q, k, v = (layout.restore(x) for x in (q, k, v))
  attend = IMPLEMENTATIONS[plan.implementation]
  out, lse = attend(q, k, v, sink_logits=None, **{**call, **indices})
  return layout.apply(out), layout.apply(lse)
