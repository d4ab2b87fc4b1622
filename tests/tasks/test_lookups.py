"""Keys are unambiguous, answers stand where they should, places are drawn."""

import numpy as np
import pytest

from longctx.tasks import make_task


def examples(task, number=300):
  return [task.get(0, 'train', index) for index in range(number)]


@pytest.mark.parametrize('key', ['suffix', 'prefix'])
def test_key_of_a_lookup_occurs_once_and_its_answer_follows(key):
  task = make_task('ngram_lookup', num_symbols=4, key=key)
  lengths = set()
  for example in examples(task):
    tokens = example.tokens.tolist()
    asked = int(np.flatnonzero(example.weights)[0])
    ends = [t for t, token in enumerate(tokens) if token == 2]
    if key == 'suffix':
      string, ngram = tokens[1 : ends[0]], tokens[ends[0] + 1 : asked + 1]
    else:
      string, ngram = tokens[ends[0] + 1 : ends[1]], tokens[1 : ends[0]]
      assert asked == ends[1]
    assert len(ngram) == 3
    lengths.add(len(string))
    found = [
      begin for begin in range(len(string)) if string[begin:][:3] == ngram
    ]
    assert len(found) == 1
    answer = example.labels[asked : asked + 4].tolist()
    assert answer == string[found[0] + 3 :][:4]
    assert tokens[asked + 1 : asked + 4] == answer[:-1]
    assert not any(tokens[asked + 4 :])
  low, high = task.lengths
  assert lengths == set(range(low, high + 1))


def test_key_of_a_lookup_stands_anywhere():
  task = make_task('ngram_lookup', min_length=12, max_length=12)
  places = set()
  for example in examples(task):
    string, key = example.tokens[1:13], example.tokens[14:17]
    places.add(next(b for b in range(10) if (string[b:][:3] == key).all()))
  assert places == set(range(6))


def test_assignments_come_after_what_they_refer_to():
  task = make_task('variable_tracking', num_chains=4, num_hops=2)
  orders = set()
  for example in examples(task):
    tokens = example.tokens
    assigned, chain = {}, []
    for place in np.flatnonzero(tokens == 1):
      variable, source = tokens[place - 1], tokens[place + 1]
      assert variable not in assigned
      # A value begins a chain; a variable has its value by now.
      is_value = source < 3 + 16
      assigned[variable] = (source, 0) if is_value else assigned[source]
      value, hops = assigned[variable]
      assigned[variable] = (value, hops + (not is_value))
      chain.append(int(value))
    assert len(assigned) == 12
    assert len({value for value, _ in assigned.values()}) == 4
    assert assigned[tokens[-1]] == (example.labels[-1], 2)
    names = list(dict.fromkeys(chain))
    orders.add(tuple(names.index(value) for value in chain))
  assert len(orders) > 200


def test_assignments_do_not_overlap_and_stand_anywhere():
  task = make_task('variable_tracking', num_chains=2, num_hops=0, seq_len=16)
  seen = set()
  for example in examples(task):
    places = np.flatnonzero(example.tokens == 1)
    assert len(places) == 2 and places[1] - places[0] >= 3
    seen.update(places.tolist())
  assert seen == set(range(2, 13))


def test_needles_have_keys_of_their_own_and_stand_anywhere():
  task = make_task('multi_needle', num_needles=3, num_queries=3, value_length=2)
  seen, orders = set(), set()
  for example in examples(task, 600):
    tokens = example.tokens
    places = np.flatnonzero(tokens == 1)
    queries = np.flatnonzero(tokens == 2)
    keys = tokens[places + 1].tolist()
    asked = tokens[queries + 1].tolist()
    assert len(set(keys)) == 3
    assert sorted(keys) == sorted(asked)
    orders.add(tuple(keys.index(key) for key in asked))
    seen.update(places.tolist())
    assert queries.tolist() == [53, 57, 61]
    expected = (queries[:, None] + [1, 2]).ravel()
    np.testing.assert_array_equal(np.flatnonzero(example.weights), expected)
  assert seen == set(range(1, 50))
  assert len(orders) == 6


def test_names_of_a_book_are_different():
  task = make_task('phone_book', num_letters=2, num_entries=5)
  for example in examples(task):
    book = example.tokens[:45].reshape(5, 9)
    assert (book[:, 0] == 1).all() and (book[:, 4] == 2).all()
    assert len(np.unique(book[:, 1:4], axis=0)) == 5
    assert (book[:, 5:] >= 4).all() and (book[:, 5:] < 14).all()
    assert example.tokens[45] == 3
    assert not example.tokens[45 + 8 :].any()
    np.testing.assert_array_equal(
      np.flatnonzero(example.weights), 49 + np.r_[:4]
    )


def test_a_book_fills_the_sequence_unless_told_otherwise():
  task = make_task('phone_book', seq_len=100)
  assert task.entries == 10
  assert (task.get(0, 'train', 0).tokens == 1).sum() == 10
