"""A sample of the random calls of attention on meshes."""

import pytest

from tests.fuzz.attention_calls import try_call


@pytest.mark.parametrize(
  ('op', 'index'),
  [
    *[('attention', index) for index in range(6)],
    *[('recurrence', index) for index in range(3)],
    *[('short_conv', index) for index in range(3)],
    ('moba', 1),
  ],
)
def test_a_random_call_is_right_or_refused(op, index):
  outcome, text = try_call(1, index, [op])
  assert outcome in ('right', 'refused'), text
