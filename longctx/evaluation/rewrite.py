"""System 2 Attention: write the context anew for the question, then answer.

    x' = rewrite(x), y = answer(x')

One model does both, on two instructions (`tasks.opinions`); what it has not
copied into x' cannot sway its answer. After Weston and Sukhbaatar, 2023
(https://arxiv.org/abs/2311.11829), whose variants are the METHODS here. There
a context is text and nothing is known of it; here every unit of it is a fact,
an opinion or neither, so that what was kept can be counted.

A unit that the context does not hold is an invention: it is struck out of x'
before the answer, and counted.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.decoding.sampler import GREEDY, Generator, Prompts, Stream
from longctx.models.transformer import Transformer
from longctx.tasks import opinions
from longctx.tasks.opinions import UNIT, Opinions


class OpinionQuestion(NamedTuple):
  """Question of a test example, taken apart.

  Attributes:
    units: int32[U, 4], the context.
    about: topic and name.
  """

  units: np.ndarray
  about: np.ndarray
  answer: int

  @property
  def facts(self) -> np.ndarray:
    """bool[U]: the fact that is asked for."""
    return self._concerns & (self.units[:, 0] == opinions.FACT)

  @property
  def views(self) -> np.ndarray:
    """bool[U]: what somebody believes of it."""
    return self._concerns & (self.units[:, 0] != opinions.FACT)

  @property
  def _concerns(self) -> np.ndarray:
    return (self.units[:, 1:3] == self.about).all(axis=1)


def questions(
  task: Opinions, *, seed: int, count: int, split: str = 'test'
) -> list[OpinionQuestion]:
  """Examples of a task whose instruction is to answer."""
  found = []
  for index in range(count):
    example = task.get(seed, split, index)
    units, about, end = task.read(example.tokens)
    found.append(OpinionQuestion(units, about, int(example.labels[end - 1])))
  return found


class Rewritten(NamedTuple):
  """Rewritten context, as a model wrote it.

  Attributes:
    units: int32[_, 4], those that the context holds.
    invented: units that it does not hold, and left-over tokens.
    about: the topic and name that it wrote after the units, as far as it did.
    length: tokens written, END included.
  """

  units: np.ndarray
  invented: int
  about: np.ndarray
  length: int


def parse(written: np.ndarray, context: np.ndarray) -> Rewritten:
  """Takes a rewritten context apart, against the original int32[U, 4].

  Args:
    written: tokens, to the first END or -1, or to the last.
    context: what was to be rewritten.
  """
  stops = np.flatnonzero((written == opinions.END) | (written < 0))
  length = int(stops[0]) if stops.size else len(written)
  body = written[:length]
  queries = np.flatnonzero(body[::UNIT] == opinions.QUERY) * UNIT
  end = int(queries[0]) if queries.size else length
  whole = end // UNIT * UNIT
  units = body[:whole].reshape(-1, UNIT)
  known = {tuple(unit) for unit in context.tolist()}
  real = np.array([tuple(unit) in known for unit in units.tolist()], bool)
  return Rewritten(
    units=units[real],
    invented=int((~real).sum()) + int(end > whole),
    about=body[end + 1 : end + 3],
    length=min(length + 1, len(written)),
  )


@dataclasses.dataclass(frozen=True)
class Method:
  """System 2 Attention method: a way from a question to its answer.

  Attributes:
    instruction: what the answer is asked by.
    rewrite: what the context is rewritten by; '' for not at all.
    context: (question, rewritten, rng) -> the units that are answered from.
    own_question: whether the question, too, is the one that was written.
  """

  instruction: str = 'answer'
  rewrite: str = ''
  context: Callable[..., np.ndarray] = lambda q, r, rng: q.units
  own_question: bool = False


def _written(question, rewritten, rng):
  return rewritten.units


def _both(question, rewritten, rng):
  return np.concatenate([question.units, rewritten.units])


def _without_views(question, rewritten, rng):
  return question.units[~question.views]


def _at_random(question, rewritten, rng):
  kept = rng.permutation(len(question.units))[: len(rewritten.units)]
  return question.units[np.sort(kept)]


# The paper's, in its order; a control, as many units as S2A at random; and a
# model with a gate, which chooses by itself.
METHODS = {
  'baseline': Method(),
  'oracle': Method(context=_without_views),
  's2a': Method(rewrite='rewrite', context=_written),
  'keep_original': Method(rewrite='rewrite', context=_both),
  'single': Method(rewrite='rewrite', context=_written, own_question=True),
  'not_instructed': Method(rewrite='plain_rewrite', context=_written),
  'instructed': Method(instruction='neutral_answer'),
  'random_drop': Method(rewrite='rewrite', context=_at_random),
  'gate': Method(),
}


# Tokens that are written, with room for a unit more than there should be.
LONGEST = UNIT * 3 + 4


def capacity(task: Opinions, methods: Collection[str]) -> int:
  """The most tokens of a row that these methods read and write."""
  rewrites = any(METHODS[name].rewrite for name in methods)
  # KeepOrig reads what was written behind the context.
  return UNIT * task.max_units + 6 + (2 * LONGEST if rewrites else 1)


class Answerer:
  """Answers questions by a trained model, by any method.

  Args:
    model: trained on `tasks.opinions`.
    methods: those that it will answer by, which room is made for.
    step: of the training that made the parameters.
    chunk: tokens of a prompt that are read at once.
  """

  def __init__(
    self,
    model: Transformer,
    task: Opinions,
    *,
    methods: Collection[str] = tuple(METHODS),
    step: int | None = None,
    chunk: int = 64,
  ):
    self.model, self.task = model, task
    self._gated = model.config.gate.keep > 0
    self._generator = Generator(
      model,
      capacity=capacity(task, methods),
      chunk=chunk,
      sampling=GREEDY,
      stop_tokens=(opinions.END,),
      step=step,
      max_new=LONGEST,
      num_tokens=task.vocab_size,
    )
    self._key = jax.random.key(0)

  def rewrite(
    self, asked: Sequence[OpinionQuestion], instruction: str
  ) -> list[Rewritten]:
    """Writes the contexts anew."""
    tokens, _ = self._continue(
      [self.task.prompt(q.units, q.about, instruction) for q in asked],
      LONGEST,
    )
    return [parse(row, q.units) for row, q in zip(tokens, asked, strict=True)]

  def answer(
    self, asked: Sequence[OpinionQuestion], method: str, *, seed: int = 0
  ) -> list[dict[str, Any]]:
    """Answers by a method; a row per question.

    Returns:
      Per question: `answer` (a token), `correct`, tokens `read` and `written`,
      `flops`, and the share of the batch's `seconds`; where the context is
      rewritten, or there is a gate, `precision` and `recall` of its relevant
      tokens (where nothing is kept, precision is 1); and of a rewritten context
      errors by kind: `dropped` (the fact is not there), `opinion` (somebody's
      view is), `invented` (units that were struck out).
    """
    how = METHODS[method]
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    rewritten = [None] * len(asked)
    if how.rewrite:
      rewritten = self.rewrite(asked, how.rewrite)
    prompts, contexts = [], []
    for q, r in zip(asked, rewritten, strict=True):
      about = q.about
      if how.own_question and len(r.about) == 2:
        about = r.about
      contexts.append(how.context(q, r, rng))
      prompts.append(self.task.prompt(contexts[-1], about, how.instruction))
    answers, stream = self._continue(prompts, 1)
    answers = answers[:, 0]
    seconds = (time.perf_counter() - start) / len(asked)
    rows = []
    for q, r, units, prompt, answer in zip(
      asked, rewritten, contexts, prompts, answers, strict=True
    ):
      row = {'answer': int(answer), 'correct': bool(answer == q.answer)}
      row |= {'read': len(prompt), 'written': 1, 'seconds': seconds}
      row['flops'] = self.model.flops(len(prompt))
      if r is not None:
        first = len(self.task.prompt(q.units, q.about, how.rewrite))
        row['read'] += first
        row['written'] += r.length
        row['flops'] += self.model.flops(first + r.length)
        if how.context is _at_random:
          r = r._replace(units=units, invented=0)
        row |= kept(q, r)
      rows.append(row)
    if self._gated:
      places = self._passed(stream, prompts)
      for row, question, own in zip(rows, asked, places, strict=True):
        row |= passed(question, own)
    return rows

  def _passed(self, stream, prompts: list[np.ndarray]) -> np.ndarray:
    """Places of the prompts that passed the gate, -1 behind the last."""
    last = np.array([len(prompt) - 1 for prompt in prompts])
    found = self.model.gate(stream.cache.outputs, jnp.asarray(last), answer=1)
    return np.asarray(found.kept.places)

  def _continue(
    self, prompts: list[np.ndarray], length: int
  ) -> tuple[np.ndarray, Stream]:
    """int32[B, length], -1 behind END, and what was read."""
    stream = self._generator.start(Prompts.of(prompts))
    stream, tokens = self._generator.draw(stream, self._key, length)
    return np.asarray(tokens), stream


def passed(question: OpinionQuestion, places: np.ndarray) -> dict[str, float]:
  """What a gate has kept of the context, as `kept` says of a rewritten one."""
  # BOS stands before the units, and the question behind them.
  units = (places - 1) // UNIT
  inside = (places > 0) & (units < len(question.units))
  relevant = question.facts[units[inside]]
  return {
    'precision': float(relevant.mean()) if relevant.size else 1.0,
    'recall': float(relevant.sum() / (UNIT * question.facts.sum())),
  }


def kept(question: OpinionQuestion, rewritten: Rewritten) -> dict[str, Any]:
  """What a rewritten context has of the original, and its errors by kind."""
  fact = question.units[question.facts]
  views = question.units[question.views]
  inside = lambda units, others: sum(
    tuple(u) in {tuple(o) for o in others.tolist()} for u in units.tolist()
  )
  found = inside(fact, rewritten.units)
  total = len(rewritten.units) + rewritten.invented
  return {
    'precision': inside(rewritten.units, fact) / total if total else 1.0,
    'recall': found / len(fact) if len(fact) else 1.0,
    'dropped': found < len(fact),
    'opinion': inside(rewritten.units, views) > 0,
    'invented': rewritten.invented > 0,
  }
