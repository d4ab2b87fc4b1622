"""Linear recurrences: linear attention and the gated delta rule, by chunks."""

from longctx.ops.recurrence.api import (
  IMPLEMENTATIONS,
  gated_delta_rule,
  linear_attention,
  linear_recurrence,
)

__all__ = [
  'IMPLEMENTATIONS',
  'gated_delta_rule',
  'linear_attention',
  'linear_recurrence',
]
