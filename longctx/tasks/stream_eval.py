"""StreamEval: a stream of facts, and now and then a question about one."""

import dataclasses

import numpy as np

from longctx.tasks.checks import Natural, Positive, large_enough
from longctx.tasks.task import Example, Task, next_token_labels

FACT, QUERY, FIRST_SYMBOL = 0, 1, 2
# Of more keys than these a few are drawn, and not all put in an order.
MOST_LISTED = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamEval(Task):
  """StreamEval: keys get values all the time; a query asks for one of them.

  After every `facts_per_query` facts comes a query, about a key that got its
  value `lag` facts before, and then its answer. One symbol per key, two facts
  per query, lag 2, `F` and `Q` the markers, keys a b c d, values 1 2 3 4:

    position  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17
    tokens    F  a  3  F  c  1  Q  a  3  F  b  1  F  d  4  Q  b  1
    labels                         3                          1
    weights   0  0  0  0  0  0  0  1  0  0  0  0  0  0  0  0  1  0

  The task that StreamingLLM (Xiao et al., 2023,
  https://arxiv.org/abs/2309.17453, section 4.3) calls StreamEval: a line of
  text per fact, a question every ten lines about the line twenty before. Its
  data was not published; here facts are tokens, so that a small model learns
  to answer, and what counts is what it still holds.

  Keys come in an order drawn anew for each example, all of them before one
  comes again with a new value. Queries about facts that there are not yet are
  not scored, and ask for the first one.

  Chance is 1 / num_symbols: values are independent and uniform. The ceiling is
  1: a value stands behind the last mention of its key.

  Attributes:
    num_symbols: different symbols of keys, and as many different values.
    key_length: symbols of a key.
    facts_per_query: facts between two queries.
    lag: how many facts ago the one that is asked for was told, 1 for the last
      one; 0 draws it anew for each query.
    max_lag: the largest lag that is drawn; 0: as many facts as there were.
  """

  seq_len: Positive = 256
  num_symbols: Positive = 16
  key_length: Positive = 2
  facts_per_query: Positive = 2
  lag: Natural = 0
  max_lag: Natural = 0

  def check(self):
    if max(self.lag, self.max_lag) > self.num_keys:
      raise ValueError(
        f'lag={self.lag} and max_lag={self.max_lag} must be at most '
        f'{self.num_keys}, after which keys come again: raise num_symbols or '
        'key_length'
      )
    if self.num_keys >= 2**63:
      raise ValueError(
        f'num_symbols={self.num_symbols} and key_length={self.key_length} must '
        'make fewer than 2**63 keys: lower one of them'
      )
    blocks = -(-max(self.lag, 1) // self.facts_per_query)
    large_enough(self, 'seq_len', blocks * self.block_len, 'lag')

  @property
  def num_keys(self) -> int:
    """Different keys."""
    # That there are too many is seen at 2**64.
    return self.num_symbols ** min(self.key_length, 64)

  @property
  def block_len(self) -> int:
    """Tokens of some facts and a query."""
    return (self.facts_per_query + 1) * (self.key_length + 2)

  @property
  def vocab_size(self) -> int:
    return FIRST_SYMBOL + 2 * self.num_symbols

  @property
  def chance(self) -> float:
    return 1 / self.num_symbols

  def example(self, rng: np.random.Generator) -> Example:
    blocks = -(-self.seq_len // self.block_len)
    per_block = self.facts_per_query
    facts = blocks * per_block
    # A key as digits, so that keys beside each other share no symbols more
    # often than others.
    if self.num_keys > max(MOST_LISTED, facts):
      order = rng.choice(self.num_keys, facts, replace=False)
    else:
      order = rng.permutation(self.num_keys)[np.arange(facts) % self.num_keys]
    digits = self.num_symbols ** np.arange(self.key_length)
    keys = FIRST_SYMBOL + order[:, None] // digits % self.num_symbols
    values = rng.integers(self.num_symbols, size=facts)
    values = FIRST_SYMBOL + self.num_symbols + values
    told = per_block * (1 + np.arange(blocks))
    lags = np.full(blocks, self.lag)
    if not self.lag:
      most = np.minimum(told, self.max_lag or self.num_keys)
      lags = rng.integers(1, most + 1)
    asked = np.maximum(told - lags, 0)

    lines = np.zeros((blocks, per_block + 1, self.key_length + 2), np.int32)
    lines[:, :-1, 0] = FACT
    lines[:, :-1, 1:-1] = keys.reshape(blocks, per_block, -1)
    lines[:, :-1, -1] = values.reshape(blocks, per_block)
    lines[:, -1, 0] = QUERY
    lines[:, -1, 1:-1] = keys[asked]
    lines[:, -1, -1] = values[asked]
    scored = np.zeros(lines.shape, np.float32)
    # The answer is predicted at the last symbol of the key.
    scored[:, -1, -2] = told >= lags
    tokens = lines.reshape(-1)[: self.seq_len]
    weights = scored.reshape(-1)[: self.seq_len]
    # What follows the last token is not there to be scored.
    weights[-1] = 0
    return Example(
      tokens=tokens, labels=next_token_labels(tokens), weights=weights
    )

  def solve(self, tokens: np.ndarray) -> np.ndarray:
    """The value behind the last mention of the key."""
    answers = np.zeros_like(tokens)
    latest: dict[bytes, int] = {}
    for begin in np.flatnonzero(tokens < FIRST_SYMBOL):
      end = begin + 1 + self.key_length
      key = tokens[begin + 1 : end].tobytes()
      if end < len(tokens) and tokens[begin] == FACT:
        latest[key] = tokens[end]
      if end <= len(tokens) and tokens[begin] == QUERY:
        answers[end - 1] = latest[key]
    return answers
