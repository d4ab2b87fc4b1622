"""Every variant can do what its table says, and refuses the rest."""

import re

import pytest

from longctx.attention import VARIANTS
from longctx.attention.capabilities import CAPABILITIES
from tests.attention import conformance
from tests.attention.capabilities import PAGE, render


def test_every_capability_has_a_check():
  assert list(conformance.CHECKS) == list(CAPABILITIES)


def test_page_of_capabilities_is_current():
  assert PAGE.read_text() == render(), 'run `make capabilities`'


@pytest.mark.parametrize('variant', VARIANTS)
def test_reasons_are_for_known_capabilities(variant):
  assert set(VARIANTS[variant].unsupported) <= set(CAPABILITIES)


# What the inner loop leaves to `make test-all`: cells that cost most, for all
# but a mask, a recurrence and a layer of both, which show them every time.
SLOW = {
  'bfloat16',
  'short',
  'eager',
  'second_derivative',
  'query_indices',
  'gqa',
  'alibi',
  'dropout',
  'analysis',
  'packing',
  'sharded_decode',
  'short_conv',
  *conformance.OF_BLOCKS,
  *conformance.MESHES,
  'pallas',
}
ALWAYS = ('sliding_window', 'gated_deltanet', 'window_linear')


def cell(variant, capability):
  is_slow = capability in SLOW and variant not in ALWAYS
  marks = [pytest.mark.slow] if is_slow else []
  name = f'{variant}-{capability}'
  return pytest.param(variant, capability, marks=marks, id=name)


@pytest.fixture(autouse=True)
def forget_others(request):
  """Frees the programs of a variant when the next one's turn comes."""
  if 'variant' in request.fixturenames:
    conformance.forget_all_but(request.getfixturevalue('variant'))


@pytest.mark.parametrize(
  ('variant', 'capability'),
  [cell(variant, name) for variant in VARIANTS for name in CAPABILITIES],
)
def test_variant_does_what_the_table_says(variant, capability, record_property):
  record_property('cell', f'{variant} {capability}')
  reason = VARIANTS[variant].unsupported.get(capability)
  check = conformance.CHECKS[capability]
  if reason is None:
    check(variant)
  else:
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
      check(variant)
