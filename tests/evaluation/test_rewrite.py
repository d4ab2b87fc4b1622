"""System 2 Attention: what is taken for what, before any training."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.evaluation import rewrite
from longctx.evaluation.rewrite import (
  METHODS,
  Answerer,
  OpinionQuestion,
  kept,
  parse,
  passed,
)
from longctx.models import TransformerConfig, make_model
from longctx.models.gate import GateConfig
from longctx.tasks import make_task
from longctx.tasks.opinions import END, FACT, OPINION, QUERY, SENTENCE

CONTEXT = np.array(
  [[SENTENCE, 90, 91, 92], [FACT, 12, 30, 50], [OPINION, 12, 30, 51]]
)
ASKED = OpinionQuestion(CONTEXT, np.array([12, 30]), 50)


def written(*units, tail=(QUERY, 12, 30, END)):
  return np.array([*np.ravel(units), *tail, -1, -1], np.int32)


def test_a_faithful_rewriting_is_all_there_is():
  found = parse(written(CONTEXT[1]), CONTEXT)
  assert found.units.tolist() == [CONTEXT[1].tolist()]
  assert found.about.tolist() == [12, 30]
  assert (found.invented, found.length) == (0, 8)
  assert kept(ASKED, found) == {
    'precision': 1.0,
    'recall': 1.0,
    'dropped': False,
    'opinion': False,
    'invented': False,
  }


def test_errors_are_told_apart():
  opinion = kept(ASKED, parse(written(CONTEXT[1:]), CONTEXT))
  assert (opinion['precision'], opinion['opinion']) == (0.5, True)
  dropped = kept(ASKED, parse(written(CONTEXT[0]), CONTEXT))
  assert (dropped['recall'], dropped['dropped']) == (0.0, True)
  nothing = kept(ASKED, parse(written([]), CONTEXT))
  assert (nothing['precision'], nothing['dropped']) == (1.0, True)


def test_an_invented_unit_is_struck_out_and_counted():
  invented = [FACT, 12, 30, 52]
  found = parse(written(CONTEXT[1], invented), CONTEXT)
  assert found.units.tolist() == [CONTEXT[1].tolist()]
  assert found.invented == 1
  assert kept(ASKED, found)['precision'] == 0.5


@pytest.mark.parametrize(
  'tail', [(FACT, 12, END), (FACT, 12), (FACT, 12, QUERY)]
)
def test_what_breaks_off_is_an_invention(tail):
  found = parse(written(CONTEXT[1], tail=tail), CONTEXT)
  assert (len(found.units), found.invented) == (1, 1)
  assert len(found.about) == 0


def test_what_passes_a_gate_is_held_against_the_fact():
  # The fact is the second unit: places 5 to 8; 13 to 16 are the question.
  found = passed(ASKED, np.array([1, 2, 7, 8, 13, 14, 15, 16, -1]))
  assert found == {'precision': 0.5, 'recall': 0.5}
  assert passed(ASKED, np.array([13, -1])) == {'precision': 1.0, 'recall': 0.0}


@pytest.fixture(scope='module')
def task():
  return make_task('opinions', seq_len=60, num_facts=2, num_units=9)


def make_answerer(task, **gate):
  config = TransformerConfig(
    vocab_size=task.vocab_size,
    layers=('sliding_window(window=8)', 'full'),
    d_model=16,
    num_heads=2,
    gate=GateConfig(**gate),
  )
  return Answerer(make_model(config, rngs=nnx.Rngs(0)), task, chunk=16)


def test_every_method_reads_what_it_should(task, monkeypatch):
  answerer = make_answerer(task)
  asked = rewrite.questions(task, seed=0, count=3)
  read = {}

  def rewritten(questions, instruction):
    # A perfect model: what each instruction asks for.
    plain = instruction == 'plain_rewrite'
    return [
      parse(
        written(q.units[q.facts | (q.views & plain)], tail=(QUERY, 1, 2, END)),
        q.units,
      )
      for q in questions
    ]

  monkeypatch.setattr(answerer, 'rewrite', rewritten)
  original = answerer._continue

  def continued(prompts, length):
    read['prompts'] = prompts
    return original(prompts, length)

  monkeypatch.setattr(answerer, '_continue', continued)
  lengths = {}
  for method in METHODS:
    rows = answerer.answer(asked, method)
    lengths[method] = {len(prompt) for prompt in read['prompts']}
    assert all(row['flops'] > 0 and row['seconds'] > 0 for row in rows)
    if method == 'random_drop':
      # Of what was drawn, not of what had been written.
      assert all(row['recall'] in (0, 1) for row in rows)
      assert any(row['recall'] == 0 for row in rows)
    elif METHODS[method].rewrite:
      assert all(row['recall'] == 1 for row in rows)
    if method == 'single':
      assert all(list(p[-3:-1]) == [1, 2] for p in read['prompts'])
  # BOS, units, QUERY, topic, name and instruction.
  of = lambda units, more=0: {1 + 4 * units + 4 + more}
  assert lengths == {
    'baseline': of(9),
    'oracle': of(8),
    's2a': of(1),
    'keep_original': of(10),
    'single': of(1),
    'not_instructed': of(2),
    'instructed': of(9, 1),
    'random_drop': of(1),
    'gate': of(9),
  }


@pytest.mark.parametrize('gate', [{}, dict(keep=2, span=4, question=4)])
def test_answers_are_those_of_the_model_on_the_prompt(task, gate):
  """Ragged prompts, read in chunks, against one forward pass each."""
  answerer = make_answerer(task, **gate)
  asked = rewrite.questions(task, seed=0, count=2)
  rows = answerer.answer(asked, 'oracle')
  for question, row in zip(asked, rows, strict=True):
    assert ('precision' in row) == bool(gate)
    units = question.units[~question.views]
    prompt = task.prompt(units, question.about, 'answer')
    weights = np.zeros((1, len(prompt)), np.float32)
    weights[0, -1] = 1
    labels = np.full((1, len(prompt)), row['answer'])
    out = answerer.model.loss(
      *map(jnp.asarray, (prompt[None], labels, weights))
    )
    assert float(out['correct']) == 1
