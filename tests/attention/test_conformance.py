"""Every variant can do what its table says, and refuses the rest."""

import re

import pytest

from longctx.attention import VARIANTS
from longctx.attention.capabilities import CAPABILITIES
from tests.attention.capabilities import PAGE, render
from tests.attention.conformance import CHECKS, forget


def test_every_capability_has_a_check():
  assert list(CHECKS) == list(CAPABILITIES)


def test_page_of_capabilities_is_current():
  assert PAGE.read_text() == render(), 'run `make capabilities`'


@pytest.mark.parametrize('variant', VARIANTS)
def test_reasons_are_for_known_capabilities(variant):
  assert set(VARIANTS[variant].unsupported) <= set(CAPABILITIES)


@pytest.fixture(autouse=True)
def forget_variant(request):
  yield
  if request.node.name.partition('@')[0].endswith(
    f'-{list(CAPABILITIES)[-1]}]'
  ):
    forget()


# One worker for all of a variant, whose checks share compiled programs.
@pytest.mark.parametrize('capability', CAPABILITIES)
@pytest.mark.parametrize(
  'variant',
  [
    pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in VARIANTS
  ],
)
def test_variant_does_what_the_table_says(variant, capability, record_property):
  record_property('cell', f'{variant} {capability}')
  reason = VARIANTS[variant].unsupported.get(capability)
  if reason is None:
    CHECKS[capability](variant)
  else:
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
      CHECKS[capability](variant)
