"""Bigram-backcopy: a Markov chain of bigrams, where triggers copy backwards."""

import bisect
import dataclasses
import functools
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float64, Int64

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, scored
from longctx.typing import Between, PositiveNumber, Seed

BOS = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigramBackcopy(Task):
  """Bigram-backcopy: after a trigger comes the token before it once more.

  BOS is 0, symbols are 1 ... V - 1. A symbol is followed by one that its row of
  a fixed matrix draws, unless it is a trigger: what follows a trigger is a copy
  of the token before it. T = 8, the only trigger 5:

    position  0   1  2  3  4  5  6  7
    tokens    BOS 9  2  5  2  7  5  7
    labels    9   2  5  2  7  5  7  4
    weights   1   1  1  1  1  1  1  1

  The labels 2 at position 3 and 7 at position 6 are copies; all others are
  draws. Every prediction is scored, that of the first symbol too. A head that
  copies from the token before has work at triggers alone, and rests elsewhere,
  which one does by attending to BOS.

  Paper: Active-Dormant Attention Heads (Guo et al., 2024,
  https://arxiv.org/abs/2410.13835): bigrams of characters of Shakespeare, 64
  of them and BOS, T = 256, the 3 most frequent symbols as triggers, one layer
  with one head. Here the rows are drawn once from a Dirichlet distribution,
  and the triggers are the most frequent symbols of the stationary distribution
  of those bigrams. As in the published code, the first symbol is drawn from
  that distribution without its triggers, so the token before a trigger is
  always a symbol, and never a trigger itself.

  Chance, `ceiling` and `optimal_loss` are exact expectations at this length, by
  the forward recursion of the process. Chance is the share of the most frequent
  label. The ceiling is the accuracy of the likeliest next symbol: a trigger's
  is certain, the others' are the largest entries of their rows.

  Attributes:
    vocab_size: V, BOS included. The paper: 65.
    num_triggers: how many symbols are triggers, the most frequent ones.
    concentration: of the symmetric Dirichlet distribution of a row: the smaller
      it is, the fewer successors a symbol has.
    chain_seed: draws the rows. They are the same for all seeds of examples and
      all splits.
  """

  seq_len: Positive = 64
  vocab_size: Annotated[int, Between(3, 2**10)] = 48
  num_triggers: Natural = 3
  concentration: PositiveNumber = 0.08
  chain_seed: Seed = 0

  def check(self):
    # BOS, and two symbols that are no triggers.
    large_enough(self, 'vocab_size', self.num_triggers + 3, 'num_triggers')
    # A chain that cannot be used is refused now.
    _ = self._chain

  @property
  def bigrams(self) -> Float64[np.ndarray, 'V V']:
    """P(next | current); BOS draws the first symbol. Triggers ignore theirs."""
    return self._chain.bigrams

  @property
  def triggers(self) -> Int64[np.ndarray, ' k']:
    """The trigger tokens, in ascending order."""
    return self._chain.triggers

  def is_trigger(self, tokens: np.ndarray) -> Bool[np.ndarray, '...']:
    """Where the next token is a copy of the one before: shape of tokens."""
    return np.isin(tokens, self.triggers)

  @property
  def chance(self) -> float:
    return float(self._expected.label_counts.max()) / self.seq_len

  @property
  def ceiling(self) -> float:
    draws, copies = self._expected.draws, self._expected.copies
    return float(draws @ self.bigrams.max(axis=1) + copies) / self.seq_len

  @property
  def optimal_loss(self) -> float:
    """Entropy of the process, in nats per scored token: the least loss."""
    p = self.bigrams
    surprise = -np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy = (p * surprise).sum(axis=1)
    return float(self._expected.draws @ entropy) / self.seq_len

  def example(self, rng: np.random.Generator) -> Example:
    chain = self._chain
    rows, is_trigger = chain.cumulative, set(chain.triggers.tolist())
    before, current = BOS, BOS
    stream = [BOS]
    for u in rng.random(self.seq_len).tolist():
      if current in is_trigger:
        before, current = current, before
      else:
        before, current = current, bisect.bisect_right(rows[current], u)
      stream.append(current)
    tokens = np.array(stream, np.int32)
    return scored(tokens[:-1], slice(None), labels=tokens[1:])

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The token before a trigger, the likeliest successor of the others."""
    likeliest = self.bigrams.argmax(axis=1)[tokens]
    return np.where(self.is_trigger(tokens), np.roll(tokens, 1), likeliest)

  @property
  def _chain(self) -> '_Chain':
    return _make_chain(
      self.vocab_size, self.num_triggers, self.concentration, self.chain_seed
    )

  @property
  def _expected(self) -> '_Expected':
    return _expect(self)


@dataclasses.dataclass(frozen=True)
class _Chain:
  """Markov chain drawn once: rows, their cumulative sums and the triggers."""

  bigrams: np.ndarray
  cumulative: list[list[float]]
  triggers: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Expected:
  """Expected counts of an example.

  Attributes:
    draws: float64[V], how often the label after a token is drawn from its row.
    copies: how many labels are copies.
    label_counts: float64[V], how often a token is a label.
  """

  draws: np.ndarray
  copies: float
  label_counts: np.ndarray


@functools.lru_cache(maxsize=16)
def _make_chain(
  vocab_size: int, num_triggers: int, concentration: float, chain_seed: int
) -> _Chain:
  rng = np.random.default_rng(chain_seed)
  n = vocab_size - 1
  rows = rng.dirichlet(np.full(n, concentration), size=n)
  stationary = _stationary(rows)
  triggers = np.sort(np.argsort(-stationary, kind='stable')[:num_triggers])
  start = stationary.copy()
  start[triggers] = 0
  if not start.sum() > 1e-9:
    raise ValueError(
      f'{concentration=} and {chain_seed=} draw a chain that stays at '
      f'triggers with {num_triggers=}: raise concentration or take another '
      'chain_seed'
    )
  bigrams = np.zeros((vocab_size, vocab_size))
  bigrams[BOS, 1:] = start / start.sum()
  bigrams[1:, 1:] = rows
  cumulative = bigrams.cumsum(axis=1)
  # The last sum is 1 to the last bit, so that every draw falls below it.
  cumulative /= cumulative[:, -1:]
  triggers += 1
  bigrams.flags.writeable = triggers.flags.writeable = False
  return _Chain(bigrams, cumulative.tolist(), triggers)


def _stationary(rows: np.ndarray) -> np.ndarray:
  """Where the chain is after very many steps from a uniform start."""
  # A chain that may stay where it is has the same stationary distribution and
  # no period. Squaring 40 times makes 2**40 steps.
  power = (rows + np.eye(len(rows))) / 2
  for _ in range(40):
    power = power @ power
    power /= power.sum(axis=1, keepdims=True)
  return power.mean(axis=0)


@functools.lru_cache(maxsize=16)
def _expect(task: BigramBackcopy) -> _Expected:
  """Runs the process forward in probability, exactly.

  A trigger is never beside another, so the pair of the last two tokens is
  either a symbol that draws or a trigger together with the symbol before it,
  which is what will be copied.
  """
  p = task.bigrams
  is_trigger = task.is_trigger(np.arange(task.vocab_size))
  to_symbols = np.where(is_trigger, 0, p)
  to_triggers = np.where(is_trigger, p, 0).sum(axis=1)
  at_symbol = np.zeros(task.vocab_size)
  at_symbol[BOS] = 1
  to_copy = np.zeros(task.vocab_size)
  draws, copied = np.zeros_like(at_symbol), np.zeros_like(at_symbol)
  for _ in range(task.seq_len):
    draws += at_symbol
    copied += to_copy
    at_symbol, to_copy = (
      at_symbol @ to_symbols + to_copy,
      at_symbol * to_triggers,
    )
  return _Expected(draws, float(copied.sum()), draws @ p + copied)
