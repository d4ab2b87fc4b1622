"""Passkey: depth and length mean what they say, up to a million tokens."""

import time

import numpy as np
import pytest

from longctx.tasks import SPLITS, make_task


@pytest.mark.parametrize(('depth', 'place'), [(0.0, 1), (0.5, 45), (1.0, 89)])
def test_depth_places_the_key(depth, place):
  task = make_task('passkey', seq_len=100, depth=depth)
  for index in range(20):
    tokens = task.get(0, 'train', index).tokens
    assert np.flatnonzero(tokens == 1).tolist() == [place]
    assert np.flatnonzero(tokens == 2).tolist() == [95]


def test_negative_depth_draws_every_place():
  task = make_task('passkey', seq_len=20)
  places = {
    int(np.flatnonzero(task.get(0, 'train', i).tokens == 1)[0])
    for i in range(300)
  }
  assert places == set(range(1, 10))


def test_no_symbol_comes_twice_in_a_key():
  task = make_task('passkey', num_symbols=5)
  for index in range(50):
    example = task.get(0, 'train', index)
    assert len(set(example.labels[example.weights > 0])) == 5


def test_a_million_tokens_take_under_a_second():
  task = make_task('passkey', seq_len=2**20)
  best = {}
  for split in SPLITS:
    times = []
    for index in range(3):
      start = time.perf_counter()
      task.get(0, split, index)
      times.append(time.perf_counter() - start)
    best[split] = min(times)
  assert max(best.values()) < 1, best
