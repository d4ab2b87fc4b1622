"""Opinions: conditions, instructions, and what the answers depend on."""

import numpy as np
import pytest

from longctx.tasks import make_task
from longctx.tasks.opinions import (
  DOUBT,
  END,
  FACT,
  INSTRUCTIONS,
  NEUTRAL,
  OPINION,
  QUERY,
  SENTENCE,
  UNIT,
)


def taken_apart(index=0, **fields):
  task = make_task('opinions', **fields)
  example = task.get(0, 'test', index)
  units, about, end = task.read(example.tokens)
  asked = (units[:, 1:3] == about).all(axis=1)
  return example, units, asked, end


@pytest.mark.parametrize(
  ('condition', 'marks', 'right'),
  [
    ('none', [], None),
    ('suggest_correct', [OPINION], True),
    ('suggest_wrong', [OPINION], False),
    ('refute_correct', [DOUBT], True),
  ],
)
def test_a_condition_says_what_is_believed(condition, marks, right):
  for index in range(20):
    example, units, asked, end = taken_apart(index, condition=condition)
    answer = example.labels[end - 1]
    facts = units[asked & (units[:, 0] == FACT)]
    views = units[asked & (units[:, 0] != FACT)]
    assert facts[:, 3].tolist() == [answer]
    assert views[:, 0].tolist() == marks
    assert all((view[3] == answer) == right for view in views)


def test_everything_is_there_as_often_as_asked():
  _, units, asked, _ = taken_apart(
    seq_len=120,
    num_facts=5,
    num_in_topic=3,
    num_mentions=4,
    num_opinions=2,
    num_units=20,
  )
  assert len(units) == 20
  marks = units[:, 0]
  assert (marks[asked] == FACT).sum() == 4
  assert (marks[asked] == OPINION).sum() == 2
  assert (marks == SENTENCE).sum() == 20 - 4 - 2 - 5 - 3
  topic = units[asked][0, 1]
  in_topic = (units[:, 1] == topic) & ~asked & (marks == FACT)
  assert in_topic.sum() == 3
  others = units[(marks == FACT) & ~asked][:, 1:3]
  assert len(np.unique(others, axis=0)) == 5 + 3


@pytest.mark.parametrize('depth', [0.0, 0.5, 1.0])
def test_the_fact_lies_at_its_depth(depth):
  _, units, asked, _ = taken_apart(depth=depth, num_units=21)
  place = np.flatnonzero(asked & (units[:, 0] == FACT))
  assert place.tolist() == [round(20 * depth)]


def test_rewriting_keeps_the_fact_and_a_plain_one_the_opinion_too():
  for instruction, marks in (
    ('rewrite', [FACT]),
    ('plain_rewrite', [FACT, OPINION]),
  ):
    example, units, asked, end = taken_apart(instruction=instruction)
    assert (example.tokens[end - 2] == NEUTRAL) == (instruction == 'rewrite')
    written = example.labels[example.weights > 0]
    said = written[:-4].reshape(-1, UNIT)
    assert said[:, 0].tolist() == marks
    assert {tuple(u) for u in said} <= {tuple(u) for u in units[asked]}
    question = example.tokens[end - 4 :][:2]
    if instruction == 'plain_rewrite':
      question = example.tokens[end - 3 :][:2]
    assert written[-4:].tolist() == [QUERY, *question, END]


def test_relevant_is_the_fact_wherever_it_is_said():
  example, units, asked, _ = taken_apart(num_mentions=2)
  rows = example.relevant[1 : 1 + UNIT * len(units)].reshape(-1, UNIT)
  facts = asked & (units[:, 0] == FACT)
  np.testing.assert_array_equal(rows, np.repeat(facts[:, None], UNIT, 1))
  assert example.relevant.sum() == 2 * UNIT


def test_training_contradicts_as_often_as_it_says():
  task = make_task(
    'opinions',
    seq_len=96,
    condition='train',
    instruction='answer',
    agree=0.8,
    stale=0.25,
  )
  facts, views = [], []
  for index in range(600):
    example = task.get(0, 'train', index)
    units, about, end = task.read(example.tokens)
    asked = (units[:, 1:3] == about).all(axis=1)
    answer = example.labels[end - 1]
    facts += [units[asked & (units[:, 0] == FACT)][0, 3] == answer]
    views += [u[3] == answer for u in units[asked & (units[:, 0] == OPINION)]]
  # Within four standard errors.
  assert abs(np.mean(facts) - 0.75) < 4 * np.sqrt(0.25 * 0.75 / 600)
  assert abs(np.mean(views) - 0.8) < 4 * np.sqrt(0.2 * 0.8 / len(views))
  assert 240 < len(views) < 360


@pytest.mark.parametrize('instruction', INSTRUCTIONS)
def test_an_answer_is_no_token_that_is_read(instruction):
  task = make_task('opinions', seq_len=96, instruction=instruction)
  for index in range(20):
    example = task.get(0, 'train', index)
    scored = np.flatnonzero(example.weights)
    if scored.size == 1:
      assert not example.tokens[scored[0] + 1 :].any()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      dict(condition='agree'),
      "unknown task.condition='agree'; known: train, none",
    ),
    (
      dict(instruction='say'),
      "unknown task.instruction='say'; known: train, answer",
    ),
    (dict(agree=1.5), r'agree=1.5 must be in \[0, 1\]'),
    (dict(num_mentions=0), 'num_mentions=0 must be at least 1'),
    (dict(num_names=2), 'num_names=2 must be above num_in_topic=2'),
    (dict(num_facts=999), 'make 240 facts of other topics, and num_facts=999'),
    (dict(num_units=5), 'num_units=5 must be 0 or at least the 12 units'),
    (dict(seq_len=50), 'seq_len=50 is too short for 12 units'),
    (dict(depth=2.0), r'depth=2.0 must be in \[-1, 1\]'),
  ],
)
def test_bad_fields_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    make_task('opinions', **fields)
