"""A sample of the damage that `python -m tests.fuzz.damage` does."""

import pytest

from tests.fuzz import damage


@pytest.fixture(scope='module')
def campaign(tmp_path_factory):
  with damage.compiled_once():
    yield damage.Campaign(tmp_path_factory.mktemp('damage'))


@pytest.mark.parametrize('seed', range(6))
def test_damage_to_a_run_is_recovered_or_named(campaign, seed):
  what, said = campaign.case(seed, ('finished', 'stopped'))
  assert not said.startswith('WRONG'), f'{what}: {said}'


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(100, 130))
def test_damage_to_anything_is_recovered_or_named(campaign, seed):
  what, said = campaign.case(seed)
  assert not said.startswith('WRONG'), f'{what}: {said}'
