"""Rematerialization: what a block keeps for its backward pass."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = 'attention'


def keep(*outputs: Any) -> tuple[Any, ...]:
  """Marks the outputs of attention, (out, lse), as worth keeping.

  They are O(T), and computing them again takes O(T²): policies that keep
  anything should keep these.
  """
  return tuple(checkpoint_name(x, ATTENTION) for x in outputs)


def keeping(policy: Any) -> Any:
  """A checkpoint policy that keeps what `keep` marks too."""
  policies = jax.checkpoint_policies
  return policies.save_from_both_policies(
    policy, policies.save_only_these_names(ATTENTION)
  )
