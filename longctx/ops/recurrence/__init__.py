"""Linear recurrences: linear attention and the gated delta rule, by chunks."""

from longctx.ops.recurrence.additive import IMPLEMENTATIONS, linear_attention
from longctx.ops.recurrence.delta import gated_delta_rule

__all__ = ['IMPLEMENTATIONS', 'gated_delta_rule', 'linear_attention']
