"""cuDNN's flash attention on NVIDIA GPUs, for plain causal and windowed calls.

JAX's call rounds lse to the dtype of out, and drops its cotangent without a
word: so it serves only where nothing reads lse, and never as a part of a ring.
Its gradients have none of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from longctx.masks import Causal, Full, Mask, SlidingWindow
from longctx.ops.dot_product_attention.normalizers import SOFTMAX, Normalizer
from longctx.ops.target import target
from longctx.typing import Array, Float

DTYPES = ('bfloat16', 'float16')
WIDEST_HEAD = 128

# GPUs that have cuDNN's flash attention, by what their names hold.
KINDS = ('A100', 'H100', 'H200', 'B100', 'B200')

# Arguments that there is no place for in the call.
UNKNOWN = (
  'q_positions',
  'k_positions',
  'q_segment_ids',
  'k_segment_ids',
  'logits_soft_cap',
  'sink_logits',
  'alibi_slopes',
  'dropout',
  'block_sizes',
)


def unsupported_reason(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask,
  normalizer: Normalizer,
  uses_lse: bool,
  **call: Any,
) -> str | None:
  """Why cuDNN does not support a call, or None where it does.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: who reads whom.
    normalizer: of the logits.
    uses_lse: whether anything reads lse beside out.
    **call: the other arguments of an implementation.
  """
  if target().platform != 'gpu':
    return f'cuDNN runs on NVIDIA GPUs, and this is for {target().platform}'
  if not any(kind in target().kind for kind in KINDS):
    return f'{target().kind!r} is not known to run it, as {KINDS} are'
  dtypes = {x.dtype.name for x in (q, k, v)}
  if len(dtypes) > 1 or not dtypes <= set(DTYPES):
    return (
      f'q, k and v are of {sorted(dtypes)}, and must all be of one {DTYPES}'
    )
  H, V = q.shape[-1], v.shape[-1]
  if H != V or H > WIDEST_HEAD or H % 8:
    return f'{H=} and {V=} must be the same, a multiple of 8, at most 128'
  # Exactly these: a subclass may allow other pairs.
  causal = type(mask) is Causal or (
    type(mask) is SlidingWindow and mask.is_causal
  )
  if not causal and type(mask) is not Full:
    return f'it has no mask like {mask}'
  if causal and q.shape[1] != k.shape[1]:
    return f'a causal mask needs T = S, got {q.shape[1]} and {k.shape[1]}'
  if normalizer.terms is not SOFTMAX.terms:
    return 'it has no other normalizer than softmax'
  if uses_lse:
    return 'its lse is rounded and has no gradient, and lse is asked for'
  return _not_taken(call)


def _not_taken(call: dict[str, Any]) -> str | None:
  """Names an argument that cuDNN would not be given."""
  for name in UNKNOWN:
    if call.get(name) is not None:
      return f'it does not take {name}'
  return None


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask,
  scale: float,
  **others: Any,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Attention by cuDNN, of calls that `unsupported_reason` lets pass.

  Returns:
    out in the dtype of q, and NaN in place of lse, which nobody reads.
  """
  # Block sizes are a mesh's own, where the caller gave none.
  if reason := _not_taken({**others, 'block_sizes': None}):
    raise NotImplementedError(f'cuDNN: {reason}')
  window = None
  if isinstance(mask, SlidingWindow):
    window = (mask.left, 0)
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    is_causal=not isinstance(mask, Full),
    local_window_size=window,
    implementation='cudnn',
  )
  return out, jnp.full(q.shape[:3], jnp.nan, jnp.float32)
