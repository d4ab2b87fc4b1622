"""Context parallelism: attention over sequences that no one device holds.

The same names and arguments as in ops, and where to run: global arrays, under
`jit`, differentiated from outside.
"""

from longctx.parallel.gathered_kv import with_gathered_kv
from longctx.parallel.halo import short_conv
from longctx.parallel.mesh import (
  ensure_devices,
  has_accelerator,
  make_mesh,
  topology_mesh,
)
from longctx.parallel.placement import Placement, sequence_axes
from longctx.parallel.processes import join_processes
from longctx.parallel.recurrences import (
  gated_delta_rule,
  linear_attention,
  linear_recurrence,
)
from longctx.parallel.schemes import SCHEMES, dot_product_attention

__all__ = [
  'SCHEMES',
  'Placement',
  'dot_product_attention',
  'ensure_devices',
  'gated_delta_rule',
  'has_accelerator',
  'join_processes',
  'linear_attention',
  'linear_recurrence',
  'make_mesh',
  'sequence_axes',
  'short_conv',
  'topology_mesh',
  'with_gathered_kv',
]
