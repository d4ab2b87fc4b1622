"""Linear recurrence as Pallas kernels for TPUs: the chunks of chunked.py.

A kernel computes a chunk of several heads at a time and keeps their states in
VMEM; see pallas_tpu_call.py.
"""

import jax
import jax.numpy as jnp

from longctx.ops import tpu
from longctx.ops.recurrence.pallas_tpu_call import scan_chunks
from longctx.ops.recurrence.pallas_tpu_kernels import ScanKernel
from longctx.ops.recurrence.pallas_tpu_layout import ChunkLayout, state_bytes
from longctx.ops.recurrence.pallas_tpu_products import product_costs
from longctx.ops.recurrence.steps import Results, SegmentIndex, State, Steps
from longctx.ops.target import target
from longctx.ops.tpu import VMEM_LIMIT
from longctx.typing import Array, Float

# As many steps as a TPU's vectors are long.
_LARGEST_CHUNK = 128
_LARGEST_WIDTH = 512
_MIB = 2**20


def recurrence(
  steps: Steps,
  state: State,
  segment_index: SegmentIndex,
  *,
  scale: float,
  chunk_size: int,
  out_dtype: jax.typing.DTypeLike,
) -> Results:
  """The recurrence of reference.py, chunk by chunk; same arguments, same sums.

  Time T (C (P + V) + 2 P V) per head, with beta T (2 C (P + V) + C² log2(C) +
  3 P V), and with a decay per channel T C P log2(C) more, or twice that with
  beta. Memory is that of `scan_chunks`. Query heads that share a key head read
  one copy of it. Products of float32 have JAX's default matmul precision: what
  is between one pass in bfloat16 and full precision counts as full, and those
  that solve the system of the delta rule are full.

  Args:
    chunk_size: with beta, C is the next power of two, from 16 to 128; else C is
      128.
  """
  P, V = steps.q.shape[-1], steps.v.shape[-1]
  by_channel = steps.log_decay is not None and steps.log_decay.ndim == 4
  delta = steps.beta is not None
  chunk = min(1 << (chunk_size - 1).bit_length(), _LARGEST_CHUNK)
  layout = ChunkLayout.choose(
    steps,
    chunk=chunk if delta else _LARGEST_CHUNK,
    heads=2 if by_channel else 4,
  )
  C = layout.chunk
  flops, exponentials = product_costs(C, P, steps.log_decay)
  flops += 2 * C * (C * V + 2 * P * V)
  if delta:
    # Keys ask as queries do. A product in full precision is six in bfloat16.
    solving = 6 * 2 * C**3 * C.bit_length()
    flops += flops + solving - 2 * C * P * V
  kernel = ScanKernel(
    'delta_rule' if delta else 'linear_attention',
    layout,
    scale,
    flops=flops,
    exponentials=exponentials,
    out_dtype=out_dtype,
    interpret=target().platform != 'tpu',
  )
  return scan_chunks(kernel, state, steps, segment_index)


def unsupported_reason(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
) -> str | None:
  """Why the kernels do not take a call, and what to take; None if they do."""
  if reason := tpu.unsupported_reason(target()):
    return f"{reason}: take 'xla' or None"
  for name, x in dict(q=q, k=k, v=v).items():
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return (
        f'{name} is {x.dtype}, and its kernels take float32 and bfloat16: '
        "take 'xla' or None"
      )
  G = q.shape[2] // k.shape[2]
  P, V = q.shape[-1], v.shape[-1]
  if max(P, V) > _LARGEST_WIDTH:
    return (
      f'{P=} and {V=} must be at most {_LARGEST_WIDTH}, or a state does not '
      "fit into VMEM: take 'xla' or None"
    )
  size = G * state_bytes(P, V)
  if size > VMEM_LIMIT // 2:
    return (
      f'the states {P=} x {V=} of {G} query heads that share a key head take '
      f'{size // _MIB} MiB of VMEM, more than {VMEM_LIMIT // 2 // _MIB}: '
      "take 'xla' or None"
    )
  return None
