"""Widths that make two models cost the same."""

import dataclasses

import pytest

from longctx.models.matching import COSTS, cost_of, match
from longctx.models.transformer import TransformerConfig

FULL = TransformerConfig(
  vocab_size=64, layers=('full',) * 2, d_model=64, num_heads=2
)
LINEAR = dataclasses.replace(FULL, layers=('linear',) * 2)


@pytest.mark.parametrize(
  ('cost', 'vary', 'multiple'),
  [
    ('parameters', 'd_model', 4),
    ('parameters', 'mlp_dim', 1),
    ('state_bytes', 'head_dim', 2),
    ('state_bytes', 'value_dim', 1),
    ('flops', 'mlp_dim', 1),
  ],
)
def test_width_is_the_one_that_costs_the_same(cost, vary, multiple):
  like = dataclasses.replace(FULL, mlp_dim=100)
  matched = match(
    LINEAR, like=like, cost=cost, vary=vary, seq_len=256, multiple=multiple
  )
  target, found = (cost_of(m, cost, seq_len=256) for m in (like, matched))
  assert abs(found - target) <= 0.1 * target
  # No neighbouring width is nearer.
  for step in (-multiple, multiple):
    width = getattr(matched, vary) + step
    if width > 0:
      other = dataclasses.replace(matched, **{vary: width})
      other = cost_of(other, cost, seq_len=256)
      assert abs(found - target) <= abs(other - target)


def test_costs_are_those_of_the_model():
  found = {cost: cost_of(LINEAR, cost, seq_len=256) for cost in COSTS}
  assert found['state_bytes'] == 2 * 2 * 32 * 33 * 4
  # Embedding, four projections and a norm per layer, the last norm.
  assert found['parameters'] == 64 * 64 + 2 * (4 * 64 * 64 + 64) + 64


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(cost='bytes'), "unknown cost='bytes'; known: parameters"),
    (dict(vary='width'), "vary='width' is no field"),
    (dict(cost='state_bytes', vary='mlp_dim'), 'no mlp_dim gives state_bytes'),
    (dict(most=8), 'd_model=8 is nearest'),
  ],
)
def test_what_cannot_be_matched_says_so(change, message):
  call = dict(cost='parameters', vary='d_model', multiple=4) | change
  with pytest.raises(ValueError, match=message):
    match(LINEAR, like=FULL, seq_len=256, **call)
