"""Attention over sequences that no single device holds.

The same names and arguments as in ops, and where to run: global arrays, under
`jit`, differentiated from outside.
"""

from longctx.parallel.mesh import ensure_devices, has_accelerator, make_mesh
from longctx.parallel.schemes import SCHEMES, dot_product_attention

__all__ = [
  'SCHEMES',
  'dot_product_attention',
  'ensure_devices',
  'has_accelerator',
  'make_mesh',
]
