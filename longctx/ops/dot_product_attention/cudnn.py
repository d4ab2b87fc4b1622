"""cuDNN flash attention on NVIDIA GPUs, for plain causal and windowed calls.

JAX's call rounds lse to the dtype of out, and drops its cotangent without a
word: so it serves only where nothing reads lse, and never as a part of a ring.
Its gradients have none of their own.
"""

import jax
import jax.numpy as jnp

from longctx.masks import Causal, Full, SlidingWindow
from longctx.ops.dot_product_attention.args import AttentionArgs, OutLse
from longctx.ops.dot_product_attention.normalizers import SOFTMAX
from longctx.ops.dot_product_attention.tiling import BlockSizes
from longctx.ops.target import target
from longctx.typing import Array, Float

DTYPES = ('bfloat16', 'float16')
WIDEST_HEAD = 128

# GPUs that have cuDNN's flash attention, by what their names hold.
KINDS = ('A100', 'H100', 'H200', 'B100', 'B200')


def unsupported_reason(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  *,
  uses_lse: bool,
) -> str | None:
  """Why cuDNN does not support a call, or None where it does.

  Args:
    q: queries.
    k: keys.
    v: values.
    args: from `resolve`.
    uses_lse: whether anything reads lse beside out.
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
  mask = args.static.mask
  # Exactly these: a subclass may allow other pairs.
  causal = type(mask) is Causal or (
    type(mask) is SlidingWindow and mask.is_causal
  )
  if not causal and type(mask) is not Full:
    return f'it has no mask like {mask}'
  if causal and q.shape[1] != k.shape[1]:
    return f'a causal mask needs T = S, got {q.shape[1]} and {k.shape[1]}'
  if args.static.normalizer.terms is not SOFTMAX.terms:
    return 'it has no other normalizer than softmax'
  if uses_lse:
    return 'its lse is rounded and has no gradient, and lse is asked for'
  # What there is no place for in the call.
  own_blocks = args.static.block_sizes != BlockSizes()
  given = args.indices._asdict() | dict(
    logits_soft_cap=args.static.logits_soft_cap,
    sink_logits=args.sink_logits,
    alibi_slopes=args.alibi_slopes,
    dropout=args.dropout,
    block_sizes=args.static.block_sizes if own_blocks else None,
  )
  names = [name for name, value in given.items() if value is not None]
  return f'it does not take {names[0]}' if names else None


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
) -> OutLse:
  """Attention by cuDNN, of calls without an `unsupported_reason`.

  Returns:
    out in the dtype of q, and NaN in place of lse, which nobody reads.
  """
  mask = args.static.mask
  window = (mask.left, 0) if isinstance(mask, SlidingWindow) else None
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=args.static.scale,
    is_causal=not isinstance(mask, Full),
    local_window_size=window,
    implementation='cudnn',
  )
  return out, jnp.full(q.shape[:3], jnp.nan, jnp.float32)
