"""Hard context gate: what a question does not need is dropped.

The blocks below the gate read the whole context. Then every token is scored
against the question, a few spans are kept, and the blocks above read those
alone, one after the other as if nothing had stood between them. So they cost
the same whatever the length, a window reaches what was far away, and every
variant, scheme and cache works as it does on a short sequence.

This is System 2 Attention (Weston and Sukhbaatar, 2023,
https://arxiv.org/abs/2311.11829) in one pass: the context is not written anew
but selected from, before the answer and not by soft weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from longctx.parallel import Placement
from longctx.typing import (
  Array,
  Between,
  Bool,
  Checked,
  Float,
  Fraction,
  Int,
  Key,
  Natural,
  NonNegative,
  Positive,
  Shaped,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig(Checked):
  """Gate config: where it stands, and how much passes.

  Attributes:
    keep: spans of the context that pass; 0: no gate.
    span: tokens of a span, which ends at the token that was scored.
    question: tokens of the question, which pass. It ends where the first answer
      is predicted, and what comes before is the context.
    answer: tokens from there on that pass too, the first answer's place
      counted.
    after: blocks below the gate.
    width: of the queries and keys that scores are made of.
    labels: weight of the loss that teaches the scores what is relevant, nats
      summed over a row; 0: they learn from the answers alone.
    noise: scale of the Gumbel noise on scores in training, with which others
      than the best are tried.
    threshold: probability to be relevant that a span has to have, as its score
      tells, to be among those that pass.
  """

  prefix: ClassVar[str] = 'model.gate.'

  keep: Natural = 0
  span: Annotated[int, Between(1, 1024)] = 1
  question: Positive = 1
  answer: Positive = 1
  after: Positive = 1
  width: Positive = 64
  labels: NonNegative = 1.0
  noise: NonNegative = 0.0
  threshold: Fraction = 0.0

  def check(self):
    if self.threshold and not self.labels:
      raise ValueError(
        f'gate.threshold={self.threshold} is a probability, which scores learn '
        'from gate.labels=0 in no way: raise labels, or take threshold=0'
      )

  @property
  def num_kept(self) -> int:
    """Tokens that the blocks above the gate read."""
    return self.keep * self.span + self.question + self.answer - 1


class Kept(NamedTuple):
  """Kept spans, which pass the gate.

  Attributes:
    places: in natural order, ascending; -1 behind the last one.
    weights: 1, with the gradient of the score.
  """

  places: Int[Array, 'B n']
  weights: Float[Array, 'B n']

  def take(self, x: Shaped[Array, 'B T ...']) -> Shaped[Array, 'B n ...']:
    """x, in natural order, at these places; zeros where there are none."""
    found = x[jnp.arange(x.shape[0])[:, None], self.places]
    there = (self.places >= 0).reshape(*self.places.shape, *[1] * (x.ndim - 2))
    return jnp.where(there, found, jnp.zeros((), x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passed:
  """Passed tokens, which blocks above the gate read, and their scores.

  Attributes:
    x: outputs of the blocks below, of n tokens.
    kept: which tokens these are.
    scores: of all tokens, in natural order.
    asked: place of the last token of each question.
    placement: where x lies on a mesh; None: on one device.
  """

  x: Float[Array, 'B n D']
  kept: Kept
  scores: Float[Array, 'B T']
  asked: Int[Array, ' B']
  placement: Placement | None

  def take(self, y: Shaped[Array, 'B T']) -> Shaped[Array, 'B n']:
    """y, in natural order, at what passed, laid out as x is."""
    y = self.kept.take(y)
    return y if self.placement is None else self.placement.into_layout(y)


class ContextGate(nnx.Module):
  """Hard context gate: scores tokens against the question, lets few pass."""

  def __init__(self, config: GateConfig, d_model: int, *, rngs: nnx.Rngs):
    """Makes a gate; scores are float32 whatever the model computes in."""
    self.config = config
    linear = lambda: nnx.Linear(
      d_model, config.width, use_bias=False, rngs=rngs
    )
    self.norm = nnx.RMSNorm(d_model, rngs=rngs)
    self.query, self.key = linear(), linear()
    # Few tokens are relevant.
    self.bias = nnx.Param(jnp.array(-4.0))

  def scores(
    self, x: Float[Array, 'B T D'], asked: Float[Array, 'B D']
  ) -> Float[Array, 'B T']:
    """Log-odds that a span which ends at a token matters to the question.

    Args:
      x: outputs of the blocks below.
      asked: of them, at the end of the question.
    """
    q = self.query(self.norm(asked.astype(jnp.float32)))
    # (k · W x): the question's vector is projected, not every token.
    w = self.key.kernel[...] @ q[..., None]
    x = self.norm(x.astype(jnp.float32))
    scale = self.config.width**-0.5
    return jnp.einsum('BTD,BD->BT', x, w[..., 0]) * scale + self.bias[...]

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    asked: Int[Array, ' B'],
    *,
    answer: int | None = None,
    key: Key[Array, ''] | None = None,
    placement: Placement | None = None,
  ) -> Passed:
    """Chooses what passes.

    Args:
      x: outputs of the blocks below, in the layout's order.
      asked: place of the last token of each question, in natural order.
      answer: in place of the config's, 1 where no answer is there yet.
      key: of the noise; None: none.
      placement: where x lies on a mesh; None: on one device.
    """
    rows = jnp.arange(x.shape[0])
    stored, natural, above = lambda i: i, lambda x: x, None
    if placement is not None:
      places = jnp.asarray(placement.layout.places)
      stored, natural = lambda i: places[i], placement.into_natural
    scores = natural(self.scores(x, x[rows, stored(asked)]))
    config = self.config
    if answer is not None:
      config = dataclasses.replace(config, answer=answer)
    kept = choose(scores, asked, config, key=key)
    x = x[rows[:, None], stored(kept.places)]
    # A token that did not pass would be any other vector: against that the
    # weight of one that does is measured. (Norms undo a mere scale.)
    other = jax.random.normal(jax.random.key(0), x.shape[-1:], x.dtype)
    weight = kept.weights[..., None].astype(x.dtype)
    x = weight * x + (1 - weight) * other
    if placement is not None:
      layout = dataclasses.replace(placement.layout, seq_len=x.shape[1])
      above = dataclasses.replace(placement, layout=layout)
      x = above.into_layout(x)
    return Passed(x=x, kept=kept, scores=scores, asked=asked, placement=above)


def choose(
  scores: Float[Array, 'B T'],
  asked: Int[Array, ' B'],
  config: GateConfig,
  *,
  key: Key[Array, ''] | None = None,
) -> Kept:
  """The spans of the context that pass, the question, and what comes after.

  Args:
    scores: of the tokens in natural order.
    asked: place of the last token of each question.
    config: how much passes.
    key: of the noise; None: none.
  """
  B, T = scores.shape
  begin = asked - config.question + 1
  context = jnp.arange(T) < begin[:, None]
  if config.threshold:
    context &= jax.nn.sigmoid(scores) >= config.threshold
  order = lax.stop_gradient(scores)
  if key is not None and config.noise:
    order = order + config.noise * jax.random.gumbel(key, (B, T))
  order = jnp.where(context, order, -jnp.inf)
  best, ends = lax.top_k(order, min(config.keep, T))
  rows = jnp.arange(B)[:, None]
  chosen = jnp.zeros((B, T), bool).at[rows, ends].set(best > -jnp.inf)
  # A span's weight is that of its end, and of the best where spans meet.
  p = jnp.where(chosen, jax.nn.sigmoid(scores), 0.0)
  reach, weights = chosen, p
  for back in range(1, min(config.span, T)):
    reach = reach | _earlier(chosen, back)
    weights = jnp.maximum(weights, _earlier(p, back))
  after = jnp.arange(T) - begin[:, None]
  tail = (after >= 0) & (after < config.question + config.answer - 1)
  # Straight through: 1 in value.
  weights = 1 + jnp.where(tail, 0, weights - lax.stop_gradient(weights))
  kept = reach | tail
  n = min(config.num_kept, T)
  left, places = lax.top_k(jnp.where(kept, T - jnp.arange(T), 0), n)
  places = jnp.where(left > 0, places, -1)
  return Kept(places, weights[rows, places])


def _earlier(x: Shaped[Array, 'B T'], n: int) -> Shaped[Array, 'B T']:
  """x[t + n] at t."""
  return jnp.pad(x[:, n:], [(0, 0), (0, n)])


def ends_of(relevant: Bool[Array, 'B T'], span: int) -> Bool[Array, 'B T']:
  """The tokens at which spans end that cover what is relevant.

  A run of relevant tokens is cut into spans from its end on.
  """
  T = relevant.shape[1]
  places = jnp.arange(T)
  # The next token that is not relevant ends the run.
  after = lax.cummin(jnp.where(relevant, T, places), axis=1, reverse=True)
  return relevant & ((after - places) % span == 1 % span)


def measure(
  passed: Passed, relevant: Bool[Array, 'B T'], config: GateConfig
) -> dict[str, Float[Array, '']]:
  """Sums over the batch, of the context alone.

  Returns:
    `gate_loss` (nats, of the scores against the ends of relevant spans), and
    tokens that were `kept`, that are `relevant`, and `kept_relevant` both.
  """
  scores, kept = passed.scores, passed.kept
  begin = passed.asked - config.question + 1
  context = jnp.arange(scores.shape[1]) < begin[:, None]
  relevant = relevant & context
  ends = ends_of(relevant, config.span)
  nll = jax.nn.softplus(jnp.where(ends, -scores, scores))
  total = lambda x: jnp.sum(x, dtype=jnp.float32)
  return {
    'gate_loss': total(jnp.where(context, nll, 0)),
    'kept': total(kept.take(context)),
    'relevant': total(relevant),
    'kept_relevant': total(kept.take(relevant)),
  }


def shares(sums: Mapping[str, float]) -> dict[str, float]:
  """`precision` and `recall` of the relevant tokens, from sums of `measure`.

  Nothing where the sums are not there, as without a gate.
  """
  if 'kept' not in sums:
    return {}
  return {
    'precision': sums['kept_relevant'] / max(sums['kept'], 1e-9),
    'recall': sums['kept_relevant'] / max(sums['relevant'], 1e-9),
  }
