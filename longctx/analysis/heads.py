"""Scores of the heads of a layer: sinks, spans, and what induction is made of.

All are means over queries of sums Σ_s A_ts f(t, s), see `probes`, so that they
exist for every variant and nothing holds a matrix of pairs. A of softmax is the
weights; A of a recurrence is what its output amounts to.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from longctx.analysis import logits
from longctx.analysis.probes import weighted_sums
from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.typing import Array, Bool, Float, Int

# Up to this many tokens A itself is made, some columns at a time.
EXACT = 512


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


def attention_scores(
  layer: Attention,
  x: Float[Array, 'B T D'],
  real: Bool[Array, 'B T'],
  context: Context,
  *,
  seq_len: int,
  epsilon: float = 0.3,
  first: int = 4,
  buckets: int = 8,
  with_logits: bool = True,
) -> dict[str, Float[Array, '...']]:
  """Where the heads of a layer look, whatever the tokens are.

  Args:
    layer: of any variant that has 'analysis'.
    x: its inputs.
    real: places that are no padding.
    context: where the tokens are.
    seq_len: of a row, without padding.
    epsilon: a sink gets more than this of an average query.
    first: how many of the first tokens are looked at.
    buckets: parts of the sequence whose mass is told apart.
    with_logits: whether to look at the scores of softmax as well, which costs
      as much as the reference of attention does in time, T x 256 in memory.

  Returns:
    Per head, means over rows and queries:

      first_token      A_t0
      sink_rate        share of rows where Σ_{t ≥ 0} A_t0 / T > epsilon:
                       Sink_1^ε of Gu et al. (arXiv:2410.10781)
      first_tokens     [N, first], α_k = Σ_{t ≥ k} A_tk / (T - k), from k = 0
      mass             Σ_s A_ts, which softmax makes 1
      mass_by_bucket   [N, buckets], parts of equal length, of keys
      distance         Σ_s A_ts (t - s) / Σ_s A_ts
      span             E[(Σ_s A_ts)²] / E[Σ_s A_ts²], how many keys a query
                       reads if it reads them alike; estimated
      entropy          nats, of the weights normalized to one; softmax alone
      max_logit        the largest in any row; softmax alone
  """
  at = jnp.atleast_2d(context.true_positions(x.shape[1]))
  begins = jnp.atleast_2d(context.document_positions(x.shape[1]))
  width = jnp.float32
  bucket = jnp.minimum(at * buckets // seq_len, buckets - 1)
  # Far positions are no exact numbers in bfloat16: distances in units of T.
  fixed = [
    jax.nn.one_hot(begins, first, dtype=width),
    jax.nn.one_hot(bucket, buckets, dtype=width),
    (at / seq_len).astype(width)[..., None],
    jnp.ones((*at.shape, 1), width),
  ]
  fixed = [jnp.broadcast_to(y, (*x.shape[:2], y.shape[-1])) for y in fixed]
  signs = jax.random.rademacher(
    jax.random.key(0), (*x.shape[:2], 16), dtype=width
  )
  probes = jnp.concatenate([*fixed, signs], axis=-1) * real[..., None]
  sums = weighted_sums(layer, x, probes, context)
  firsts, parts, moment, mass, noise = jnp.split(
    sums,
    [first, first + buckets, first + buckets + 1, first + buckets + 2],
    axis=-1,
  )
  mean = lambda y: mean_over_queries(y, real)
  # A row's own mean over the queries that can read the token.
  alphas = jnp.stack(
    [
      mean_over_queries(firsts[..., k], real & (begins >= k), per_row=True)
      for k in range(first)
    ],
    axis=-1,
  )
  mass, moment = mass[..., 0], moment[..., 0]
  here = (at / seq_len)[..., None]
  found = {
    'first_token': alphas[..., 0].mean(0),
    'sink_rate': (alphas[..., 0] > epsilon).astype(width).mean(0),
    'first_tokens': alphas.mean(0),
    'mass': mean(mass),
    'mass_by_bucket': mean(parts),
    'distance': seq_len * mean(here * mass - moment) / mean(mass),
    # The mean square of Σ_s A_ts ε_s over signs ε is Σ_s A_ts².
    'span': mean(mass**2) / mean((noise**2).mean(-1)),
  }
  if with_logits:
    found |= logits.statistics(layer, x, real, context)
  return found


def matching_scores(
  layer: Attention,
  x: Float[Array, 'B T D'],
  tokens: Tokens,
  context: Context,
  *,
  num_classes: int,
  width: int | None = None,
) -> dict[str, Float[Array, ' N']]:
  """What the heads of a layer look for, on tokens that come again.

  Args:
    layer: of any variant that has 'analysis'.
    x: its inputs.
    tokens: what comes again.
    context: where the tokens are.
    num_classes: C.
    width: columns of a pass, see `probes.weighted_sums`.

  Returns:
    Per head, means over the queries whose token came before (over all, for
    previous_token):

      prefix_matching   attention to tokens behind an earlier occurrence of the
                        query's, j with x_{j-1} = x_t: an induction head's
      duplicate_token   attention to the earlier occurrences themselves
      previous_token    attention to the token before
  """
  behind = jax.nn.one_hot(tokens.previous, num_classes)
  same = jax.nn.one_hot(tokens.classes, num_classes)
  probes = jnp.concatenate([behind, same], axis=-1) * tokens.real[..., None]
  sums = weighted_sums(layer, x, probes, context, width=width)
  pick = tokens.classes[:, :, None, None]
  take = lambda y: jnp.take_along_axis(y, pick, axis=-1)[..., 0]
  own, before = diagonals(layer, x, tokens.real, context)
  asked = tokens.seen & tokens.real
  at = jnp.atleast_2d(context.document_positions(x.shape[1]))
  return {
    'prefix_matching': mean_over_queries(take(sums[..., :num_classes]), asked),
    'duplicate_token': mean_over_queries(
      take(sums[..., num_classes:]) - own, asked
    ),
    'previous_token': mean_over_queries(before, tokens.real & (at > 0)),
  }


def diagonals(
  layer: Attention,
  x: Float[Array, 'B T D'],
  real: Bool[Array, 'B T'],
  context: Context,
) -> tuple[Float[Array, 'B T N'], Float[Array, 'B T N']]:
  """A_tt and A_{t,t-1}, exact up to `EXACT` tokens, else right on average.

  With independent random signs ε as values, ε_t Σ_s A_ts ε_s is A_tt plus terms
  of mean zero and variance Σ A²; a mean over T queries and 16 columns is off by
  no more than 1 / √(16 T) or so, 0.01 at 513 tokens.
  """
  length, place = x.shape[1], lambda y: y
  if context.placement is not None:
    layout = context.placement.layout
    length, place = layout.seq_len, layout.apply
  own, columns = jnp.eye(length)[None], 1
  if length > EXACT:
    columns = 16
    shape = (1, length, columns)
    own = jax.random.rademacher(jax.random.key(1), shape, dtype=jnp.float32)
  before = jnp.roll(own, 1, axis=1).at[:, 0].set(0)
  sums = weighted_sums(layer, x, place(own) * real[..., None], context)
  return tuple(
    (sums * place(marks)[:, :, None]).sum(-1) / columns
    for marks in (own, before)
  )


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
