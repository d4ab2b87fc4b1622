"""In-context Markov chains: learn the chain of a sequence while reading it."""

import bisect
import dataclasses
import functools
from typing import Annotated

import numpy as np
from jaxtyping import Float64, Int

from longctx.tasks.checks import Positive
from longctx.tasks.task import Example, Task, scored
from longctx.typing import Between

# Sequences whose mean is the ceiling, and how many entries their counts of
# pairs may have: beyond 22 states there are fewer.
NUM_SEQUENCES = 2**13
MAX_COUNTS = 2**22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(Task):
  """A Markov chain whose matrix is drawn anew for each sequence.

  States are 0 ... k - 1. Every row of the matrix is uniform on the simplex,
  Dirichlet(1, ..., 1), and so is the first state among the states. Every next
  state is to be predicted. Two states, T = 8:

    position  0  1  2  3  4  5  6  7
    tokens    0  1  1  0  1  1  1  0
    labels    1  1  0  1  1  1  0  1
    weights   1  1  1  1  1  1  1  1

  At position 7 state 0 has been seen twice with a successor, 1 both times, so
  the next state is 1 with probability (2 + 1) / (2 + 2).

  Paper: The Evolution of Statistical Induction Heads (Edelman et al., 2024,
  https://arxiv.org/abs/2402.11004), T = 100 and two or three states. A model
  passes from `uniform` predictions to the frequencies of single states
  (`unigram`) and then to those of pairs (`bigram`); `STRATEGIES` has the three.
  The published code draws the first state from the chain's stationary
  distribution, which says a little about the matrix; drawn uniformly it says
  nothing, and `bigram` is the posterior mean, which no predictor beats.

  Chance is 1 / k: no state is likelier than another before any is seen. The
  ceiling is the expected accuracy of the likeliest state under `bigram`. At a
  finite length it has no closed form: `ceiling` and `optimal_loss` are means
  over 8,192 sequences of the probability of that state and of the entropy of
  the prediction, with the same seed every time. Their standard errors at the
  defaults are 0.0009 and 0.0012.

  Attributes:
    num_states: k.
  """

  seq_len: Positive = 100
  num_states: Annotated[int, Between(2, 2**11)] = 3

  @property
  def vocab_size(self) -> int:
    return self.num_states

  @property
  def chance(self) -> float:
    return 1 / self.num_states

  @property
  def ceiling(self) -> float:
    return _expect(self.num_states, self.seq_len)[0]

  @property
  def optimal_loss(self) -> float:
    """Mean nats per state under `bigram`: the least loss there can be."""
    return _expect(self.num_states, self.seq_len)[1]

  def example(self, rng: np.random.Generator) -> Example:
    k = self.num_states
    cumulative = rng.dirichlet(np.ones(k), size=k).cumsum(axis=1)
    # The last sum is 1 to the last bit, so that every draw falls below it.
    rows = (cumulative / cumulative[:, -1:]).tolist()
    stream = [int(rng.integers(k))]
    for u in rng.random(self.seq_len).tolist():
      stream.append(bisect.bisect_right(rows[stream[-1]], u))
    tokens = np.array(stream, np.int32)
    return scored(tokens[:-1], slice(None), labels=tokens[1:])

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The most frequent successor so far."""
    return bigram(tokens, self.num_states).argmax(axis=1)


def uniform(
  tokens: Int[np.ndarray, ' T'], num_states: int
) -> Float64[np.ndarray, 'T k']:
  """P(tokens[t + 1] | tokens[: t + 1]) of a model that has learnt nothing."""
  return np.full((len(tokens), num_states), 1 / num_states)


def unigram(
  tokens: Int[np.ndarray, ' T'], num_states: int
) -> Float64[np.ndarray, 'T k']:
  """P(tokens[t + 1] | tokens[: t + 1]) from how often each state came.

  (n_j + 1) / (t + 1 + k) for n_j visits to state j among the t + 1 so far.
  """
  visits = np.eye(num_states)[tokens].cumsum(axis=0)
  return (visits + 1) / (visits.sum(axis=1, keepdims=True) + num_states)


def bigram(
  tokens: Int[np.ndarray, ' T'], num_states: int
) -> Float64[np.ndarray, 'T k']:
  """P(tokens[t + 1] | tokens[: t + 1]) from what followed the current state.

  (n_ij + 1) / (n_i + k) at state i for n_ij steps from i to j so far: the
  posterior mean, and so the probability of the next state.
  """
  steps = np.zeros((len(tokens), num_states, num_states))
  steps[np.arange(1, len(tokens)), tokens[:-1], tokens[1:]] = 1
  counts = steps.cumsum(axis=0)[np.arange(len(tokens)), tokens]
  return (counts + 1) / (counts.sum(axis=1, keepdims=True) + num_states)


STRATEGIES = {'uniform': uniform, 'unigram': unigram, 'bigram': bigram}


@functools.lru_cache(maxsize=64)
def _expect(num_states: int, seq_len: int) -> tuple[float, float]:
  """Accuracy and loss of `bigram` in the mean.

  A row that is uniform on the simplex and only seen through its draws is a
  Pólya urn: the next state has the probability that `bigram` gives it.
  """
  rng = np.random.default_rng(0)
  N = max(1, min(NUM_SEQUENCES, MAX_COUNTS // num_states**2))
  every = np.arange(N)
  counts = np.ones((N, num_states, num_states))
  state = rng.integers(num_states, size=N)
  accuracy = loss = 0.0
  for _ in range(seq_len):
    p = counts[every, state]
    p /= p.sum(axis=1, keepdims=True)
    accuracy += float(p.max(axis=1).mean())
    loss -= float((p * np.log(p)).sum(axis=1).mean())
    u = rng.random(N)[:, None]
    after = (p.cumsum(axis=1)[:, :-1] <= u).sum(axis=1)
    counts[every, state, after] += 1
    state = after
  return accuracy / seq_len, loss / seq_len
