"""Scores of attention heads: attention sinks, induction heads, prefix matching.

    questions = [positions(real, context, seq_len=T), prefixes(tokens, C)]
    scores = ask(layer, x, questions, context)

All are means over queries of sums Σ_s A_ts f(t, s), see `probes`, so that they
exist for every variant and nothing holds a matrix of pairs. A of softmax is the
weights; A of a recurrence is what its output amounts to.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.analysis.probes import weighted_sums
from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.typing import Array, Bool, Float, Int

# Up to this many tokens diagonals are exact, by a column per token.
EXACT = 512
# Columns of random signs.
SIGNS = 16


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Tokens where a context has them, as arrays of a traced computation.

  Attributes:
    classes: of the tokens, below C; see `sequences.Sequences`.
    previous: class of the token before; C where there is none.
    seen: whether a query's token came before.
    real: False at a layout's padding.
  """

  classes: Int[Array, 'B T']
  previous: Int[Array, 'B T']
  seen: Bool[Array, 'B T']
  real: Bool[Array, 'B T']

  @property
  def asked(self) -> Bool[Array, 'B T']:
    """The queries that could match something."""
    return self.seen & self.real


class Question(NamedTuple):
  """Question about a layer's heads.

  Attributes:
    probes: in place of values, float32.
    answer: (Σ_s A_ts probes_s) -> scores by name.
  """

  probes: Float[Array, '#B T M']
  answer: Callable[[Array], dict[str, Array]]


def ask(
  layer: Attention,
  x: Float[Array, 'B T D'],
  questions: Sequence[Question],
  context: Context,
  *,
  width: int | None = None,
) -> dict[str, Float[Array, '...']]:
  """The answers of a layer's heads, all from the same passes.

  Args:
    layer: of any variant that has 'analysis'.
    x: its inputs.
    questions: below.
    context: where the tokens are.
    width: columns of a pass, see `probes.weighted_sums`.
  """
  all_rows = lambda y: jnp.broadcast_to(y, (*x.shape[:2], y.shape[-1]))
  probes = [all_rows(question.probes) for question in questions]
  sums = weighted_sums(
    layer, x, jnp.concatenate(probes, axis=-1), context, width=width
  )
  ends = np.cumsum([y.shape[-1] for y in probes])[:-1]
  answers = {}
  for question, part in zip(
    questions, jnp.split(sums, ends, axis=-1), strict=True
  ):
    answers |= question.answer(part)
  return answers


def positions(
  real: Bool[Array, 'B T'],
  context: Context,
  *,
  seq_len: int,
  epsilon: float = 0.3,
  first: int = 4,
  buckets: int = 8,
) -> Question:
  """Where heads look, whatever the tokens are.

  Args:
    real: places that are no padding.
    context: where the tokens are.
    seq_len: of a row, without padding.
    epsilon: a sink gets more than this of an average query.
    first: how many of the first tokens are looked at.
    buckets: parts of the sequence whose mass is told apart.

  Returns:
    Whose answers are, per head, means over rows and queries:

      first_token      A_t0
      sink_rate        share of rows where Σ_{t ≥ 0} A_t0 / T > epsilon:
                       Sink_1^ε of Gu et al. (arXiv:2410.10781)
      first_tokens     [N, first], α_k = Σ_{t ≥ k} A_tk / (T - k), from k = 0
      mass             Σ_s A_ts, which softmax makes 1
      mass_by_bucket   [N, buckets], parts of equal length, of keys
      distance         Σ_s A_ts (t - s) / Σ_s A_ts
      span             E[(Σ_s A_ts)²] / E[Σ_s A_ts²], how many keys a query
                       reads if it reads them alike; estimated. NaN where it is
                       clearly below one, as weights of both signs make it
  """
  B, T = real.shape
  at = jnp.atleast_2d(context.natural_positions(T))
  begins = jnp.atleast_2d(context.segment_positions(T))
  bucket = jnp.minimum(at * buckets // seq_len, buckets - 1)
  # In units of the length, which 16 bits hold to some digits.
  place = (at / seq_len).astype(jnp.float32)[..., None]
  parts = [
    jax.nn.one_hot(begins, first),
    jax.nn.one_hot(bucket, buckets),
    place,
    jnp.ones_like(place),
    jax.random.rademacher(jax.random.key(0), (B, T, SIGNS), dtype=jnp.float32),
  ]
  probes = jnp.concatenate(
    [jnp.broadcast_to(y, (B, T, y.shape[-1])) for y in parts], axis=-1
  )

  def answer(sums):
    ends = np.cumsum([y.shape[-1] for y in parts])[:-1]
    firsts, by_bucket, moment, mass, noise = jnp.split(sums, ends, axis=-1)
    mass, moment = mass[..., 0], moment[..., 0]
    # A row's own mean, over the queries that can read the token.
    alphas = [
      mean_over_queries(firsts[..., k], real & (begins >= k), per_row=True)
      for k in range(first)
    ]
    mean = lambda y: mean_over_queries(y, real)
    # The mean square of Σ_s A_ts ε_s over signs ε is Σ_s A_ts².
    span = mean(mass**2) / mean((noise**2).mean(-1))
    return {
      'first_token': alphas[0].mean(0),
      'sink_rate': (alphas[0] > epsilon).astype(jnp.float32).mean(0),
      'first_tokens': jnp.stack([alpha.mean(0) for alpha in alphas], -1),
      'mass': mean(mass),
      'mass_by_bucket': mean(by_bucket),
      'distance': seq_len * mean(place * mass - moment) / mean(mass),
      'span': jnp.where(span < 0.8, jnp.nan, span),
    }

  return Question(probes * real[..., None], answer)


def prefixes(tokens: Tokens, num_classes: int) -> Question:
  """Whether heads look behind earlier occurrences of the query's token.

  Args:
    tokens: what comes again.
    num_classes: C.

  Returns:
    Whose answer is `prefix_matching`, per head: attention to all j with
    x_{j-1} = x_t, mean over the queries whose token came before. An induction
    head's (Olsson et al., arXiv:2209.11895).
  """
  probes = jax.nn.one_hot(tokens.previous, num_classes)

  def answer(sums):
    behind = _own_class(sums, tokens)
    return {'prefix_matching': mean_over_queries(behind, tokens.asked)}

  return Question(probes * tokens.real[..., None], answer)


def neighbours(tokens: Tokens, num_classes: int, context: Context) -> Question:
  """Whether heads look at the same token, or at the one before.

  A_tt and A_{t,t-1} are exact up to `EXACT` tokens. Beyond, with independent
  random signs ε as values, ε_t Σ_s A_ts ε_s is A_tt plus terms of mean zero and
  variance Σ A², and a mean over T queries and 16 columns is off by 1 / √(16 T)
  or so, 0.01 at 513 tokens.

  Args:
    tokens: what comes again.
    num_classes: C.
    context: where the tokens are.

  Returns:
    Whose answers are, per head, means over queries:

      duplicate_token   attention to earlier occurrences of the query's token,
                        where there are any
      previous_token    attention to the token before
  """
  real = tokens.real
  length, place = real.shape[1], lambda y: y
  if context.placement is not None:
    layout = context.placement.layout
    length, place = layout.seq_len, layout.apply
  own, columns = jnp.eye(length)[None], 1
  if length > EXACT:
    columns = SIGNS
    shape = (1, length, columns)
    own = jax.random.rademacher(jax.random.key(1), shape, dtype=jnp.float32)
  before = place(jnp.roll(own, 1, axis=1).at[:, 0].set(0))
  own = place(own)
  same = jax.nn.one_hot(tokens.classes, num_classes)
  at = jnp.atleast_2d(context.segment_positions(real.shape[1]))

  def answer(sums):
    by_class, by_place = jnp.split(sums, [num_classes], axis=-1)
    diagonal, below = (
      (by_place * marks[:, :, None]).sum(-1) / columns
      for marks in (own, before)
    )
    again = _own_class(by_class, tokens) - diagonal
    return {
      'duplicate_token': mean_over_queries(again, tokens.asked),
      'previous_token': mean_over_queries(below, real & (at > 0)),
    }

  marks = jnp.broadcast_to(own, (*real.shape, own.shape[-1]))
  probes = jnp.concatenate([same, marks], axis=-1)
  return Question(probes * real[..., None], answer)


def _own_class(
  sums: Float[Array, 'B T N C'], tokens: Tokens
) -> Float[Array, 'B T N']:
  """Of each query, the column of its own token."""
  pick = tokens.classes[:, :, None, None]
  return jnp.take_along_axis(sums, pick, axis=-1)[..., 0]


def mean_over_queries(
  y: Float[Array, 'B T N ...'],
  where: Bool[Array, '#B T'],
  *,
  per_row: bool = False,
) -> Float[Array, '...']:
  """The mean over the queries `where`, of all rows together or of each."""
  where = jnp.broadcast_to(where, y.shape[:2])
  where = where.reshape(*where.shape, *[1] * (y.ndim - 2))
  axes: Any = (1,) if per_row else (0, 1)
  total = jnp.sum(jnp.where(where, y, 0), axis=axes)
  return total / jnp.maximum(jnp.sum(where, axis=axes), 1)
