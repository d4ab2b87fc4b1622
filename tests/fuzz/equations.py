"""Attention, linear recurrence and convolution as equations, numpy float64."""

import numpy as np


def attention(
  q,
  k,
  v,
  *,
  mask,
  q_positions=None,
  k_positions=None,
  q_segment_ids=None,
  k_segment_ids=None,
  normalizer='softmax',
  logits_soft_cap=None,
  alibi_slopes=None,
  sink_logits=None,
):
  """(out, lse) of softmax over the keys that the mask and segments allow."""
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  q_at = np.arange(T)[None] if q_positions is None else q_positions
  k_at = np.arange(S)[None] if k_positions is None else k_positions
  allowed = mask.allowed(q_at[:, :, None], k_at[:, None, :])
  allowed = np.broadcast_to(allowed, (B, T, S))
  if k_segment_ids is not None:
    allowed = allowed & (q_segment_ids[:, :, None] == k_segment_ids[:, None, :])
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  z = np.einsum('BTNH,BSNH->BNTS', q, k) * H**-0.5
  if logits_soft_cap is not None:
    z = logits_soft_cap * np.tanh(z / logits_soft_cap)
  if alibi_slopes is not None:
    distance = np.abs(q_at[:, None, :, None] - k_at[:, None, None, :])
    z = z - np.float64(alibi_slopes)[:, None, None] * distance
  z = np.where(allowed[:, None], z, -np.inf)
  beside = []
  if normalizer == 'softmax1':
    beside.append(np.zeros((B, N, T, 1)))
  if sink_logits is not None:
    shape = (B, N, T, 1)
    beside.append(np.broadcast_to(sink_logits[:, None, None], shape))
  everything = np.concatenate([z, *beside], axis=-1)
  top = everything.max(axis=-1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  total = np.exp(everything - top).sum(-1, keepdims=True)
  weight = np.exp(z - top) / np.where(total > 0, total, 1)
  with np.errstate(divide='ignore'):
    lse = (np.log(total) + top)[..., 0]
  out = np.einsum('BNTS,BSNV->BTNV', weight, v)
  return out, np.swapaxes(lse, 1, 2)


def recurrence(q, k, v, beta=None, log_decay=None, segment_ids=None):
  """(out, state) of linear attention, or of the gated delta rule."""
  B, T, N, P = q.shape
  k, v = (np.repeat(x, N // k.shape[2], axis=2).astype(float) for x in (k, v))
  state, out = (
    np.zeros((B, N, P, v.shape[-1])),
    np.zeros((B, T, N, v.shape[-1])),
  )
  for t in range(T):
    if log_decay is not None:
      state = np.exp(log_decay[:, t].astype(float)).reshape(B, N, -1, 1) * state
    if segment_ids is not None and t:
      same = segment_ids[:, t] == segment_ids[:, t - 1]
      state = same[:, None, None, None] * state
    value = v[:, t]
    if beta is not None:
      held = np.einsum('BNP,BNPV->BNV', k[:, t], state)
      value = beta[:, t, :, None] * (value - held)
    state = state + np.einsum('BNP,BNV->BNPV', k[:, t], value)
    out[:, t] = np.einsum('BNP,BNPV->BNV', q[:, t], state)
  return out, state


def short_conv(x, kernel, segment_ids=None):
  """Each channel's weighted sum of its last inputs of the document."""
  W, T, out = len(kernel), x.shape[1], np.zeros(x.shape)
  for t in range(T):
    seen = np.ones(len(x), bool)
    for back in range(min(W, t + 1)):
      if back and segment_ids is not None:
        seen &= segment_ids[:, t - back] == segment_ids[:, t - back + 1]
      out[:, t] += kernel[W - 1 - back] * np.where(
        seen[:, None], x[:, t - back], 0
      )
  return out
