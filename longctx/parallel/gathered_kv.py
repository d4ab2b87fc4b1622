"""All-gathered keys and values, for ops whose queries may turn to any key.

What a query chooses is known at run time alone, so nothing can be said of which
keys a device will need: they are gathered, O(S) memory per device, whatever the
scheme of softmax attention. Queries, and so time and the backward pass, stay
where they are.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longctx.ops.dot_product_attention import TokenIndices
from longctx.ops.dot_product_attention.dropout import make_dropout
from longctx.parallel.all_gather import gather
from longctx.parallel.axes import make_axes, make_layout
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Float, Int, Key


def with_gathered_kv(
  op: Callable[..., Any],
  q: Float[Array, 'B T N H'],
  *keys: Float[Array, 'B S K _'],
  mesh: Mesh,
  layout: SequenceLayout,
  axis: str | tuple[str, ...] = 'seq',
  q_positions: Int[Array, '... T'] | None = None,
  k_positions: Int[Array, '... S'] | None = None,
  q_segment_ids: Int[Array, 'B T'] | None = None,
  k_segment_ids: Int[Array, 'B S'] | None = None,
  dropout: tuple[float, Key[Array, '']] | None = None,
  per_head: Mapping[str, Any] | None = None,
  shared: Mapping[str, Any] | None = None,
  **options: Any,
) -> Any:
  """op(q, *keys, ...) of a sequence that lies on several devices.

  With T other than S the queries are few, and every device has and does them
  all.

  Args:
    op: takes q, the keys and the arguments below by name, and returns arrays
      [B, T, N, ...]. It reads positions, not the order of keys.
    q: queries, in the layout's order, padding included.
    *keys: keys and values, likewise.
    mesh: batch on 'data', heads on 'model', if the mesh has these axes and
      `axis` does not name them.
    layout: of the sequence.
    axis: mesh axis of the sequence, or several, the first outermost.
    q_positions: int [T] or [B, T]; the layout's when None.
    k_positions: int [S] or [B, S].
    q_segment_ids: documents; those of padding are of no token.
    k_segment_ids: of the keys.
    dropout: (rate, key), or None, which `op` is not called with.
    per_head: arguments of `op` with an entry per query head.
    shared: arguments of `op` of which every device takes all.
    **options: arguments of `op` that are no arrays.

  Raises:
    ValueError: shapes that do not fit the mesh.
  """
  B, T, N, _ = q.shape
  S, K = keys[0].shape[1:3]
  axes = make_axes(mesh, axis)
  axes.check(batch=B, query_heads=N, key_heads=K)
  layout = make_layout(layout, S, axes.size(axes.seq), in_layout=True)
  replicated = T != S
  queries = axes.queries_spec(replicated=replicated)
  indices = TokenIndices(
    *(
      x[None] if x is not None and x.ndim == 1 else x
      for x in (q_positions, k_positions, q_segment_ids, k_segment_ids)
    )
  )
  shared = dict(shared or {})
  dropout = make_dropout(dropout)
  if dropout is not None:
    shared['dropout'] = dropout
  per_head = jax.tree.map(jnp.asarray, dict(per_head or {}))

  def local(q, keys, indices, per_head, shared):
    of_all = functools.partial(gather, axis=axes.seq, layout=layout)
    q_positions = indices.q_positions
    if q_positions is None and not replicated:
      q_positions = layout.positions(axes.index(axes.seq))[None]
    indices = indices._replace(
      q_positions=q_positions,
      k_positions=of_all(indices.k_positions),
      k_segment_ids=of_all(indices.k_segment_ids),
    )
    if 'dropout' in shared:
      shared['dropout'] = axes.own_dropout(shared['dropout'], q)
    options_here = {**indices._asdict(), **per_head, **shared, **options}
    return op(q, *map(of_all, keys), **options_here)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      queries,
      axes.spec(heads=True),
      axes.indices_spec(indices, B, replicated=replicated),
      P(axes.heads),
      P(),
    ),
    out_specs=queries,
    check_vma=False,
  )(q, keys, indices, per_head, shared)
