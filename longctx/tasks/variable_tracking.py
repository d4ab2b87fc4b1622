"""Variable tracking: follow assignments between variables to a value."""

import dataclasses

import numpy as np

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, scored, spread

BOS, ASSIGN, QUERY, FIRST_VALUE = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
  """Variable tracking: chains of assignments in noise, one of them asked for.

  Tokens: 0 BOS, 1 ASSIGN, 2 QUERY, then values, then variables, then noise up
  to the vocabulary's end. A chain gives its first variable a value, and each
  further variable the one before it. Two chains of one hop, x = 7, y = x and
  p = 4, q = p, T = 19, `=` ASSIGN, `.` noise:

    position  0   1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17    18
    tokens    BOS p  =  4  .  x  =  7  .  .  y  =  x  q  =  p  .  QUERY y
    labels                                                             7
    weights   0   0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  0  0    1
    relevant  0   0  0  0  0  1  1  1  0  0  1  1  1  0  0  0  0  0    0

  The chains are interleaved at random, but an assignment always comes after the
  one that it refers to. One chain is asked for, at its last variable, so that
  all its hops lie between the question and the value. Everything else is
  irrelevant and can be varied by itself: num_chains - 1 chains distract, and
  noise takes what they leave of seq_len.

  After RULER's variable tracking (Hsieh et al., 2024,
  https://arxiv.org/abs/2404.06654), which asks the other way round: it names a
  value, and all variables that hold it are to be listed, of one chain of five
  in text. Here one variable is named, so that the answer is one token and
  num_hops alone says how many steps it takes.

  Chance is 1 / num_values: every value is as likely as another. (A model that
  knows the values of its context but not their chains reaches 1 / num_chains.)
  The ceiling is 1: a variable is assigned once.

  Attributes:
    vocab_size: all tokens; at least one of them is noise.
    num_values: number of different values; no two chains share one.
    num_variables: number of different variables; none is assigned twice.
    num_chains: chains, of which one is asked for and the others distract.
    num_hops: assignments of a variable to a variable in a chain; 0: the
      variable that is asked for holds its value itself.
  """

  seq_len: Positive = 64
  vocab_size: Positive = 64
  num_values: Positive = 16
  num_variables: Positive = 32
  num_chains: Positive = 3
  num_hops: Natural = 2

  def check(self):
    if self.num_values < self.num_chains:
      raise ValueError(
        f'num_values={self.num_values} is too small for num_chains='
        f'{self.num_chains}: each has a value of its own'
      )
    chains, lines = ('num_chains', 'num_hops'), self._num_lines
    large_enough(self, 'num_variables', lines, *chains)
    # At least one token is noise.
    sizes = ('num_values', 'num_variables')
    large_enough(self, 'vocab_size', self._first_noise + 1, *sizes)
    large_enough(self, 'seq_len', 3 + 3 * lines, *chains)

  @property
  def _num_lines(self) -> int:
    """Assignments, each of another variable."""
    return self.num_chains * (self.num_hops + 1)

  @property
  def _first_variable(self) -> int:
    return FIRST_VALUE + self.num_values

  @property
  def _first_noise(self) -> int:
    return self._first_variable + self.num_variables

  @property
  def chance(self) -> float:
    return 1 / self.num_values

  def example(self, rng: np.random.Generator) -> Example:
    T, C, n = self.seq_len, self.num_chains, self._num_lines
    values = FIRST_VALUE + rng.permutation(self.num_values)[:C]
    variables = rng.permutation(self.num_variables)[:n]
    variables = self._first_variable + variables.reshape(C, -1)
    sources = np.concatenate([values[:, None], variables[:, :-1]], axis=1)
    # Which chain has line i; its lines keep their order, since the sort is
    # stable.
    turns = rng.permutation(np.repeat(np.arange(C), self.num_hops + 1))
    lines = np.argsort(turns, kind='stable')

    # BOS, QUERY and the variable asked for leave T - 3 places to lines of 3
    # tokens and to noise.
    begins = 1 + spread(rng, n, 3, T - 3)
    tokens = rng.integers(
      self._first_noise, self.vocab_size, size=T, dtype=np.int32
    )
    tokens[0] = BOS
    begins = begins[lines]
    tokens[begins] = variables.ravel()
    tokens[begins + 1] = ASSIGN
    tokens[begins + 2] = sources.ravel()
    asked = int(rng.integers(C))
    tokens[-2:] = QUERY, variables[asked, -1]
    chain = begins.reshape(C, -1)[asked]
    relevant = chain[:, None] + np.arange(3)
    return scored(tokens, [-1], answers=values[asked], relevant=relevant)

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """From the variable asked for, back until a value is reached."""
    places = np.flatnonzero(tokens == ASSIGN)
    source = dict(zip(tokens[places - 1], tokens[places + 1], strict=True))
    answer = tokens[-1]
    while answer in source:
      answer = source[answer]
    answers = np.zeros_like(tokens)
    answers[-1] = answer
    return answers
