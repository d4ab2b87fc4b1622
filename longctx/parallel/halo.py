"""Halo exchange: what neighbouring shards of a sequence read of each other."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from longctx.ops.short_conv import short_conv as local_short_conv
from longctx.parallel import reorder
from longctx.parallel.axes import make_axes, make_layout
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Float, Int, Shaped


def short_conv(
  x: Float[Array, 'B T D'],
  kernel: Float[Array, 'W D'],
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  layout: str | SequenceLayout = 'contiguous',
  in_layout: bool = False,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T D']:
  """`longctx.ops.short_conv` of a sequence that lies on several devices.

    out_t = Σ_w kernel[w] x_{t - (W - 1) + w}

  Contiguous and zigzag: every span of neighbouring tokens gets the W - 1 tokens
  before it, so the bytes sent do not depend on T. Striped: neighbouring tokens
  are on neighbouring devices, so every shard is sent min(W, R) - 1 times.

  Args:
    x: inputs, in natural order, or in the layout's with `in_layout`.
    kernel: one weight per step of the window and channel.
    mesh, axis, layout, in_layout: as in `linear_recurrence`, with channels for
      heads; the layout may be 'striped' too.
    segment_ids: inputs from before the last change of the id read as zero.

  Returns:
    out, in the order and dtype of x, summed in float32.

  Raises:
    ValueError: shapes do not fit, or spans are shorter than W - 1.
  """
  B, T, D = x.shape
  W = kernel.shape[0]
  if W < 1 or kernel.shape[1] != D:
    raise ValueError(f'{kernel.shape=} must be (W, {D}) with W >= 1')
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(f'{segment_ids.shape=} must be {(B, T)}')
  axes = make_axes(mesh, axis)
  axes.check(batch=B, channels=D)
  shards = axes.size(axes.seq)
  layout = make_layout(layout, T, shards, in_layout=in_layout)
  if layout.spans_per_shard and layout.span_len < W - 1:
    raise ValueError(
      f'{layout} has spans of {layout.span_len} tokens, and a kernel of width '
      f'{W} reads {W - 1} tokens back: take fewer shards, or striped'
    )
  channels = axes.spec(heads=True)
  conv = functools.partial(
    _span_conv if layout.spans_per_shard else _striped_conv,
    layout=layout,
    axis=axis,
  )

  def local_in_natural_order(x, kernel, segment_ids):
    x, segment_ids = reorder.into_layout((x, segment_ids), layout, axis)
    return reorder.into_natural(conv(x, kernel, segment_ids), layout, axis)

  if not in_layout:
    x = reorder.pad(x, layout)
    if segment_ids is not None:
      segment_ids = reorder.pad(segment_ids, layout)
  out = jax.shard_map(
    conv if in_layout else local_in_natural_order,
    mesh=mesh,
    in_specs=(channels, PartitionSpec(None, axes.heads), axes.spec()),
    out_specs=channels,
    check_vma=False,
  )(x, kernel, segment_ids)
  return out if in_layout else out[:, :T]


def of_preceding_span(
  x: Shaped[Array, 'B spans ...'],
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Shaped[Array, 'B spans ...']:
  """What the span before each of this shard holds; zero for the first span.

  To be called inside shard_map.

  Args:
    x: one value per span of the shard.
    layout: contiguous, with span r on shard r, or zigzag, with the spans r and
      2R - 1 - r on shard r.
    axis: the mesh axes of the sequence.
  """
  R = layout.num_shards
  ascending = [(r, r + 1) for r in range(R - 1)]
  first = jax.lax.ppermute(x[:, 0], axis, ascending)
  if layout.spans_per_shard == 1:
    return first[:, None]
  descending = [(r + 1, r) for r in range(R - 1)]
  second = jax.lax.ppermute(x[:, 1], axis, descending)
  # The last shard holds the two spans in the middle of the sequence.
  is_last = jax.lax.axis_index(axis) == R - 1
  return jnp.stack([first, jnp.where(is_last, x[:, 0], second)], axis=1)


def _span_conv(
  x: Float[Array, 'B L D'],
  kernel: Float[Array, 'W D'],
  segment_ids: Int[Array, 'B L'] | None,
  *,
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Float[Array, 'B L D']:
  """The convolution of a shard that consists of spans."""
  B, L, D = x.shape
  halo = kernel.shape[0] - 1
  if halo == 0:
    return local_short_conv(x, kernel)[0]
  spans = (B, layout.spans_per_shard, layout.span_len)
  x = x.reshape(*spans, D)
  before = of_preceding_span(x[:, :, layout.span_len - halo :], layout, axis)
  if segment_ids is not None:
    segment_ids = segment_ids.reshape(spans)
    ids = of_preceding_span(
      segment_ids[:, :, layout.span_len - halo :], layout, axis
    )
    ids = jnp.concatenate([ids, segment_ids[:, :, :1]], axis=2)
    # What the first token of the span sees: nothing from before a change.
    same = ids[:, :, 1:] == ids[:, :, :-1]
    seen = jax.lax.cumprod(same.astype(jnp.int32), axis=2, reverse=True)
    before = jnp.where(seen[..., None] == 1, before, 0)
    segment_ids = segment_ids.reshape(-1, layout.span_len)
  out, _ = local_short_conv(
    x.reshape(-1, layout.span_len, D),
    kernel,
    segment_ids=segment_ids,
    initial_state=before.reshape(-1, halo, D),
  )
  return out.reshape(B, L, D)


def _striped_conv(
  x: Float[Array, 'B L D'],
  kernel: Float[Array, 'W D'],
  segment_ids: Int[Array, 'B L'] | None,
  *,
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Float[Array, 'B L D']:
  """The convolution of a shard with every R-th token."""
  W, R = kernel.shape[0], layout.num_shards
  index = jax.lax.axis_index(axis)
  # Hops by as many shards, of the tokens themselves.
  hops = [(x, segment_ids)]
  for hop in range(1, min(W, R)):
    ring = [(r, (r + hop) % R) for r in range(R)]
    hops.append(jax.lax.ppermute((x, segment_ids), axis, ring))

  def back(steps):
    """x and segment_ids of `steps` tokens before; zero before the first."""
    laps, hop = divmod(steps, R)

    def shift(x):
      def delay(n):
        widths = [(0, 0), (n, 0), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, widths)[:, : x.shape[1]]

      return jnp.where(index < hop, delay(laps + 1), delay(laps))

    return jax.tree.map(shift, hops[hop])

  dtype = jnp.promote_types(x.dtype, jnp.float32)
  out = jnp.zeros(x.shape, dtype)
  seen, later = True, segment_ids
  for steps in range(W):
    earlier_x, earlier = back(steps)
    if segment_ids is not None:
      seen, later = seen & (earlier == later), earlier
      earlier_x = jnp.where(seen[..., None], earlier_x, 0)
    out += kernel[W - 1 - steps].astype(dtype) * earlier_x.astype(dtype)
  return out.astype(x.dtype)
