"""Steps lead from the query to a number; the rest only looks like steps."""

import numpy as np
import pytest

from longctx.tasks import make_task
from longctx.tasks.arithmetic import EQUALS, FIRST_NUMBER, MINUS, PLUS, QUERY


def test_the_problem_that_is_drawn_is_solved():
  task = make_task('arithmetic', num_steps=2, num_irrelevant=1, seq_len=20)
  a, b, z, noise = 15, 16, 17, 60
  two, four, five, six = (FIRST_NUMBER + i for i in (2, 4, 5, 6))
  tokens = [
    *(0, a, EQUALS, five, PLUS, two, noise, z, EQUALS, a, MINUS, four),
    *(noise, b, EQUALS, a, PLUS, six, QUERY, b),
  ]
  assert task.solve(np.array(tokens))[-1] == FIRST_NUMBER + 3


@pytest.mark.parametrize('in_topic', [True, False])
def test_irrelevant_statements_look_like_steps_and_stand_anywhere(in_topic):
  task = make_task(
    'arithmetic', num_steps=2, num_irrelevant=2, seq_len=28, in_topic=in_topic
  )
  orders, seen = set(), set()
  for index in range(300):
    example = task.get(0, 'train', index)
    tokens = example.tokens
    begins = np.flatnonzero(tokens == EQUALS) - 1
    needed = example.relevant[begins]
    first, second = begins[needed]
    assert tokens[first + 2] < FIRST_NUMBER + task.modulus
    assert tokens[second + 2] == tokens[first]
    assert tokens[second] == tokens[-1]
    assert len(set(tokens[begins])) == 4
    sources = tokens[begins[~needed] + 2]
    problem = tokens[[first, second]]
    assert np.isin(sources, problem).all() == in_topic
    assert np.isin(sources, tokens[begins]).any() == in_topic
    orders.add(tuple(needed.tolist()))
    seen.update(begins.tolist())
  assert len(orders) == 6
  assert seen == set(range(1, 22))
