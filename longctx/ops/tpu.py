"""TPU kernels in common: chips, limits, products."""

import jax
from jax import lax

from longctx.ops.target import Target

# Lanes of a vector register: what a block's last axis fills.
LANES = 128

# VMEM that a kernel may take, of 64 MiB on the smallest of these chips. The
# compiler's own limit is 16 or 32 MiB.
VMEM_LIMIT = 48 * 2**20

# Devices, as JAX names them, that the tests compile kernels for: v5e, v5p, v6e
# and TPU7x. Earlier chips have 16 MiB of VMEM.
KINDS = (
  'TPU v5 lite',
  'TPU v5e',
  'TPU v5',
  'TPU v5p',
  'TPU v6 lite',
  'TPU v6e',
  'TPU7x',
)

# Names of JAX's default precision for which one pass in bfloat16 will do.
_ONE_PASS = (None, 'default', 'fastest', 'bfloat16', 'BF16_BF16_F32')


def precision(*, exact: bool = False) -> lax.Precision:
  """Of a product of float32 in a kernel; there is none between these two.

  Args:
    exact: in full float32, whatever JAX's default precision.
  """
  if exact or jax.config.jax_default_matmul_precision not in _ONE_PASS:
    return lax.Precision.HIGHEST
  return lax.Precision.DEFAULT


def unsupported_reason(target: Target) -> str | None:
  """Why there are no kernels for a target, or None where there are.

  On a CPU they are interpreted.
  """
  if target.platform == 'gpu':
    return 'the kernels are for TPUs, and this is for a GPU'
  if target.platform == 'tpu' and target.kind not in KINDS:
    return f'the kernels are not tested for {target.kind!r}, but for {KINDS}'
  return None
