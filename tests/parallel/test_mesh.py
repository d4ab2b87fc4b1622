"""Devices along a sequence are neighbours."""

import itertools

import jax
import pytest

from longctx.parallel.mesh import closed_walk, ensure_devices, make_mesh


@pytest.mark.parametrize(
  'sides',
  [
    (2, 4),
    (4, 2),
    (3, 4),
    (4, 3),
    (16, 16),
    (4, 1, 8),
    (2, 3, 5),
    (2, 2, 2, 2),
  ],
)
def test_a_walk_over_a_grid_is_closed_and_visits_all(sides):
  places = list(itertools.product(*map(range, sides)))
  walk = closed_walk(places)
  assert sorted(walk) == list(range(len(places)))
  for here, there in zip(walk, walk[1:] + walk[:1], strict=True):
    apart = zip(places[here], places[there], strict=True)
    assert sum(abs(a - b) for a, b in apart) == 1


def test_a_walk_goes_over_a_grid_that_others_share():
  places = [(x, 3 + 2 * y) for x in range(4) for y in range(4)]
  walk = closed_walk(places)
  steps = zip(walk, walk[1:] + walk[:1], strict=True)
  assert max(abs(places[a][1] - places[b][1]) for a, b in steps) == 2


@pytest.mark.parametrize(
  'places',
  [
    pytest.param([()] * 4, id='no-coordinates'),
    pytest.param([(i,) for i in range(4)], id='a-line'),
    pytest.param([(0, 0), (0, 1), (1, 0)], id='no-box'),
    pytest.param([(x, y) for x in range(3) for y in range(3)], id='odd'),
    pytest.param([(0, 0)] * 2 + [(0, 1)] * 2, id='shared'),
  ],
)
def test_where_there_is_no_closed_walk_the_order_stays(places):
  assert closed_walk(places) == list(range(len(places)))


def test_devices_that_cannot_be_made_any_more_are_missed_by_name():
  assert len(jax.devices()) == 8
  assert ensure_devices(4) is None
  with pytest.raises(ValueError, match='JAX has started with 8 of the count=9'):
    ensure_devices(9)


def test_devices_without_links_keep_their_order():
  ids = make_mesh(data=2, seq=2, model=2).device_ids
  assert ids.ravel().tolist() == list(range(8))
