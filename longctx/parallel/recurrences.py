"""The recurrences of ops on a mesh: their elements, and the call of each."""

import functools

import jax.numpy as jnp
from jax.sharding import Mesh

from longctx.ops import recurrence as ops
from longctx.ops.recurrence.additive import final_state as linear_final
from longctx.ops.recurrence.delta import final_state as delta_final
from longctx.parallel.axes import make_axes
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.state_scan import ShardedRecurrence, run_recurrence
from longctx.typing import Array, Float, Int


def linear_attention(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  layout: str | SequenceLayout = 'contiguous',
  in_layout: bool = False,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B N P W'] | None = None,
  normalize: bool = False,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P W']]:
  """`ops.recurrence.linear_attention` of a sequence on several devices.

  Time of a shard: that of the op on its tokens, and T P V / R per head for the
  elements; log2(R) messages per run of P V numbers per head, whatever T (see
  `wire_bytes`). Zigzag takes twice as many, one after another, as contiguous,
  and has nothing to balance here: it is for stacks with softmax attention.

  Args:
    q, k, v, log_decay, scale, segment_ids, initial_state, normalize,
    chunk_size, implementation: as in `longctx.ops.recurrence.linear_attention`.
    mesh: batch on 'data', heads on 'model', if the mesh has these axes and
      `axis` does not name them.
    axis: mesh axis of the sequence, or several, the first outermost.
    layout: 'contiguous', 'zigzag', or a SequenceLayout, which is needed with
      `in_layout` if there is padding.
    in_layout: whether the inputs and the output are in the layout's order,
      with length `layout.padded_len`; padding does not change any state.

  Returns:
    out, in the order of q, and the last state, the same on all shards.

  Raises:
    ValueError: shapes do not fit, each other or the mesh.
    NotImplementedError: the layout is striped.
  """
  _, _, N, P = q.shape
  if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
    raise ValueError(f'{log_decay.shape=} must be {q.shape[:3]} or {q.shape}')

  def element(inputs, segment_index):
    k, v = inputs['k'], inputs['v']
    if normalize:
      v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    heads = inputs['q'].shape[2]
    return linear_final.final_state(
      k,
      v,
      num_heads=heads,
      log_decay=inputs['log_decay'],
      segment_index=segment_index,
    )

  def outputs(inputs, segment_index, state):
    return ops.linear_attention(
      **inputs,
      scale=scale,
      segment_ids=segment_index,
      initial_state=state,
      normalize=normalize,
      chunk_size=chunk_size,
      implementation=implementation,
    )

  return run_recurrence(
    ShardedRecurrence(
      element=element,
      combine=_combine_factors,
      no_decay=jnp.ones_like,
      outputs=outputs,
      writes=('k', 'log_decay'),
      state_shape=(N, P, v.shape[-1] + normalize),
    ),
    dict(q=q, k=k, v=v, log_decay=log_decay),
    mesh=mesh,
    axis=axis,
    layout=layout,
    in_layout=in_layout,
    segment_ids=segment_ids,
    initial_state=initial_state,
  )


def gated_delta_rule(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'],
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  layout: str | SequenceLayout = 'contiguous',
  in_layout: bool = False,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B N P V'] | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """`ops.recurrence.gated_delta_rule` of a sequence on several devices.

  A run multiplies the state that enters it by a matrix, so a message is of
  P (P + V) numbers per head, whatever T, and a shard runs the chunked rule
  twice: once on values [v, 0] for that matrix, once for its outputs.

  Args:
    q, k, v, beta, log_decay, scale, segment_ids, initial_state, chunk_size,
    implementation: as in `longctx.ops.recurrence.gated_delta_rule`.
    mesh, axis, layout, in_layout: as in `linear_attention`.

  Returns:
    out, in the order of q, and the last state, the same on all shards.

  Raises:
    ValueError: shapes do not fit, each other or the mesh.
    NotImplementedError: the layout is striped.
  """
  _, _, N, P = q.shape
  if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
    raise ValueError(f'{log_decay.shape=} must be {q.shape[:3]} or {q.shape}')
  if beta.shape != q.shape[:3]:
    raise ValueError(f'{beta.shape=} must be {q.shape[:3]}')

  def element(inputs, segment_index):
    inputs = {name: x for name, x in inputs.items() if name != 'q'}
    return delta_final.final_state(
      **inputs, segment_index=segment_index, chunk_size=chunk_size
    )

  def outputs(inputs, segment_index, state):
    return ops.gated_delta_rule(
      **inputs,
      scale=scale,
      segment_ids=segment_index,
      initial_state=state,
      chunk_size=chunk_size,
      implementation=implementation,
    )

  return run_recurrence(
    ShardedRecurrence(
      element=element,
      combine=_combine_matrices,
      no_decay=_identity_matrices,
      outputs=outputs,
      writes=('beta', 'log_decay'),
      state_shape=(N, P, v.shape[-1]),
    ),
    dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay),
    mesh=mesh,
    axis=axis,
    layout=layout,
    in_layout=in_layout,
    segment_ids=segment_ids,
    initial_state=initial_state,
  )


def wire_bytes(
  B: int,
  N: int,
  P: int,
  V: int,
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  layout: str = 'contiguous',
  decay: str | None = None,
  packed: bool = False,
  normalize: bool = False,
  with_state: bool = True,
) -> dict[str, int]:
  """What a recurrence sends forward, all devices together.

  A scan sends R - 1, R - 2, R - 4, ... states P V per head and row, and the
  decays with all but the last of them, which nothing follows. The backward
  pass sends the gradients of all of these back.

  Args:
    B, N, P, V: rows, query heads, size of keys and of values.
    mesh, axis, normalize: as in `linear_attention`.
    layout: 'contiguous' or 'zigzag', with a scan per run.
    decay: None, 'head' or 'channel'; 'matrix' for the delta rule.
    packed: whether there are segment_ids, int32.
    with_state: whether the last state is used; else it is not sent.

  Returns:
    The bytes by kind, as `hlo.collective_bytes` counts them, for float32
    states.
  """
  axes = make_axes(mesh, axis)
  axes.check(batch=B, heads=N)
  R, data, model = map(axes.size, (axes.seq, axes.data, axes.heads))
  n = N // model
  # Of one group of devices that share a sequence.
  state = 4 * (B // data) * n * P * (V + normalize)
  decays = {None: 1, 'head': n, 'channel': n * P, 'matrix': n * P * P}
  decay_bytes = 4 * (B // data) * decays[decay]
  pairs = [R - (1 << step) for step in range((R - 1).bit_length())]
  sent = state * sum(pairs) + decay_bytes * sum(pairs[:-1])
  if packed:
    sent += 4 * (B // data) * (R - 1)
  runs = {'contiguous': 1, 'zigzag': 2}[layout]
  groups = mesh.size // R
  return {
    'collective-permute': groups * runs * sent,
    'all-reduce': groups * 2 * (R - 1) * state * with_state,
  }


def _combine_factors(earlier, later):
  """The element of two runs, one after the other; decays are factors."""
  return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _combine_matrices(earlier, later):
  """Likewise; decays are matrices, applied from the left."""
  multiply = functools.partial(jnp.matmul, precision='highest')
  return (
    multiply(later[0], earlier[0]),
    multiply(later[0], earlier[1]) + later[1],
  )


def _identity_matrices(decay: Array) -> Array:
  eye = jnp.eye(decay.shape[-1], dtype=decay.dtype)
  return jnp.broadcast_to(eye, decay.shape)
