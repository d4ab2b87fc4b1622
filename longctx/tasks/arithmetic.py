"""Arithmetic: compute one quantity from others, among irrelevant numbers."""

import dataclasses
from typing import Annotated

import numpy as np

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, scored, spread
from longctx.typing import Between

BOS, EQUALS, PLUS, MINUS, QUERY, FIRST_NUMBER = 0, 1, 2, 3, 4, 5
SIGNS = {PLUS: 1, MINUS: -1}

# A statement: a name, EQUALS, a quantity or number, PLUS or MINUS, a number.
WIDTH = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
  """Arithmetic among irrelevant statements; the query asks for one quantity.

  Tokens: 0 BOS, 1 EQUALS, 2 PLUS, 3 MINUS, 4 QUERY, then the numbers from 0 to
  modulus - 1, then names of quantities, then noise up to the vocabulary's end.
  Two steps a = 5 + 2, b = a + 6 and one irrelevant statement z = a - 4, modulo
  10, T = 20, `=`, `+` and `-` the marks, `.` noise:

    position  0   1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18    19
    tokens    BOS a  =  5  +  2  .  z  =  a  -  4  .  b  =  a  +  6  QUERY b
    labels                                                                3
    weights   0   0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  0     1
    relevant  0   1  1  1  1  1  0  0  0  0  0  0  0  1  1  1  1  1  0     0

  Each step adds a number to the quantity before it, or takes one away; the
  first begins from a number. Steps keep their order. Irrelevant statements
  stand anywhere among them and look the same, so that only the way back from
  the query tells them apart.

  After GSM-IC (Shi et al., 2023, https://arxiv.org/abs/2302.00093): problems of
  grade-school mathematics in words, to which one sentence with a number was
  added that does not affect the solution, on the problem's topic or off it,
  with one of its names or others.

  Chance is 1 / modulus: every step brings a number of its own, so that every
  answer is as likely as another. The ceiling is 1: a name is given once.

  Attributes:
    vocab_size: all tokens; at least one of them is noise.
    modulus: numbers are counted modulo this.
    num_names: number of different names; none is given twice.
    num_steps: statements that the answer takes.
    num_irrelevant: statements that it does not take.
    in_topic: whether these begin from a quantity of the problem, z = a - 4, or
      from one that nothing else speaks of, z = y - 4.
  """

  seq_len: Positive = 64
  vocab_size: Positive = 64
  modulus: Annotated[int, Between(2)] = 10
  num_names: Positive = 32
  num_steps: Positive = 3
  num_irrelevant: Natural = 3
  in_topic: bool = True

  def check(self):
    steps = ('num_steps', 'num_irrelevant')
    fewest = self._num_lines + self.num_irrelevant * (not self.in_topic)
    large_enough(self, 'num_names', fewest, *steps, 'in_topic')
    # At least one token is noise.
    sizes = ('modulus', 'num_names')
    large_enough(self, 'vocab_size', self._first_noise + 1, *sizes)
    large_enough(self, 'seq_len', 3 + WIDTH * self._num_lines, *steps)

  @property
  def _num_lines(self) -> int:
    """Statements, each of another quantity."""
    return self.num_steps + self.num_irrelevant

  @property
  def _first_name(self) -> int:
    return FIRST_NUMBER + self.modulus

  @property
  def _first_noise(self) -> int:
    return self._first_name + self.num_names

  @property
  def chance(self) -> float:
    return 1 / self.modulus

  def example(self, rng: np.random.Generator) -> Example:
    T, m, n = self.seq_len, self.num_steps, self._num_lines
    names = self._first_name + rng.permutation(self.num_names)
    first = rng.integers(self.modulus)
    numbers = rng.integers(self.modulus, size=n)
    signs = rng.choice([1, -1], n)
    others = names[n:][: n - m]
    if self.in_topic:
      others = names[rng.integers(m, size=n - m)]
    lines = np.empty((n, WIDTH), np.int32)
    lines[:, 0] = names[:n]
    lines[:, 1] = EQUALS
    lines[:, 2] = FIRST_NUMBER + first, *names[: m - 1], *others
    lines[:, 3] = np.where(signs > 0, PLUS, MINUS)
    lines[:, 4] = FIRST_NUMBER + numbers

    # BOS, QUERY and the name asked for leave T - 3 places to statements and to
    # noise. Drawn are those of statements, and which of them are the steps'.
    begins = 1 + spread(rng, n, WIDTH, T - 3)
    turns = rng.permutation(n)
    turns[:m].sort()
    places = begins[turns, None] + np.arange(WIDTH)
    tokens = rng.integers(
      self._first_noise, self.vocab_size, size=T, dtype=np.int32
    )
    tokens[0] = BOS
    tokens[places] = lines
    tokens[-2:] = QUERY, names[m - 1]
    answer = (first + (signs * numbers)[:m].sum()) % self.modulus
    return scored(
      tokens, [-1], answers=FIRST_NUMBER + answer, relevant=places[:m]
    )

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """From the name asked for, back to a number, and the sum on the way."""
    places = np.flatnonzero(tokens == EQUALS)
    statements = dict(
      zip(tokens[places - 1], tokens[places[:, None] + np.r_[1:4]], strict=True)
    )
    source, total = tokens[-1], 0
    while source >= self._first_name:
      source, operation, number = statements[source]
      total += SIGNS[operation] * (number - FIRST_NUMBER)
    answers = np.zeros_like(tokens)
    answers[-1] = FIRST_NUMBER + (source - FIRST_NUMBER + total) % self.modulus
    return answers
