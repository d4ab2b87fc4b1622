"""Causal depthwise convolution over a few steps, as in H3 and Mamba."""

import jax.numpy as jnp

from longctx.typing import Array, Float, Int, check_floats


def short_conv(
  x: Float[Array, 'B T D'],
  kernel: Float[Array, 'W D'],
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B W-1 D'] | None = None,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B W-1 D']]:
  """Each channel's weighted sum of its last W inputs.

    out_t = Σ_w kernel[w] x_{t - (W - 1) + w}

  so kernel[W - 1] weighs the step itself. Time and memory T W D, or T D when
  compiled; state (W - 1) D numbers.

  Args:
    x: inputs.
    kernel: one weight per step of the window and channel.
    segment_ids: inputs from before the last change of the id read as zero.
    initial_state: the W - 1 inputs before x, as returned by an earlier call;
      the first segment continues it. None: zero.

  Returns:
    out in the dtype of x, summed in float32, and the state after the last
    step: the last W - 1 inputs, in the dtype of x, zero where they belong to
    an earlier segment than the last step.

  Raises:
    ValueError: if shapes do not fit.
  """
  check_floats(x=x, kernel=kernel)
  B, T, D = x.shape
  W = kernel.shape[0]
  if W < 1 or kernel.shape[1] != D:
    raise ValueError(f'{kernel.shape=} must be (W, {D}) with W >= 1')
  if initial_state is None:
    initial_state = jnp.zeros((B, W - 1, D), x.dtype)
  if initial_state.shape != (B, W - 1, D):
    raise ValueError(f'{initial_state.shape=} must be {(B, W - 1, D)}')
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(f'{segment_ids.shape=} must be {(B, T)}')
  inputs = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
  segment_index = _index_segments(segment_ids, W - 1)

  def visible(x, begin, step_segment):
    if segment_index is None:
      return x
    same = segment_index[:, begin : begin + x.shape[1]] == step_segment
    return jnp.where(same[..., None], x, 0)

  dtype = jnp.promote_types(x.dtype, jnp.float32)
  out = jnp.zeros(x.shape, dtype)
  current = None if segment_index is None else segment_index[:, W - 1 :]
  for w in range(W):
    taps = visible(inputs[:, w : w + T], w, current)
    out += kernel[w].astype(dtype) * taps.astype(dtype)
  last = None if segment_index is None else segment_index[:, -1:]
  return out.astype(x.dtype), visible(inputs[:, T:], T, last)


def _index_segments(segment_ids, before):
  """How often the id has changed so far, with `before` zeros in front."""
  if segment_ids is None:
    return None
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  count = jnp.cumsum(changed, axis=1, dtype=jnp.int32)
  return jnp.pad(count, [(0, 0), (before + 1, 0)])
