"""Cross entropy of a large vocabulary, in chunks of positions."""

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float, Int


def cross_entropy_sums(
  head: Float[Array, 'D V'],
  x: Float[Array, 'B T D'],
  labels: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  *,
  chunk: int,
  soft_cap: float | None = None,
) -> dict[str, Float[Array, '']]:
  """Sums over all tokens of weighted nats, weights and right guesses.

  Logits are made `chunk` positions at a time, forward and backward, so that
  [T, V] never exists at once.

  Args:
    head: from activations to logits.
    x: activations.
    labels: tokens that the logits should predict.
    weights: of the tokens in the sums.
    chunk: positions whose logits exist at one time.
    soft_cap: as in `project`.

  Returns:
    `loss`, `weight` and `correct`, float32 scalars.
  """
  T, C = x.shape[1], min(chunk, x.shape[1])

  @jax.checkpoint
  def chunk_sums(head, x, labels, weights):
    logits = project(x, head, soft_cap=soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    hit = jnp.argmax(logits, axis=-1) == labels
    return {
      'loss': jnp.sum(jnp.where(weights > 0, lse - picked, 0.0) * weights),
      'weight': jnp.sum(weights),
      'correct': jnp.sum(hit * weights),
    }

  def body(sums, chunk):
    return jax.tree.map(jnp.add, sums, chunk_sums(head, *chunk)), None

  whole = T // C * C
  chunked = [
    jnp.moveaxis(a[:, :whole].reshape(a.shape[0], -1, C, *a.shape[2:]), 1, 0)
    for a in (x, labels, weights)
  ]
  zeros = dict.fromkeys(('loss', 'weight', 'correct'), jnp.zeros(()))
  sums, _ = jax.lax.scan(body, zeros, chunked)
  if whole < T:
    rest = (x[:, whole:], labels[:, whole:], weights[:, whole:])
    sums, _ = body(sums, rest)
  return sums


def project(
  x: Float[Array, 'B T D'],
  head: Float[Array, 'D V'],
  *,
  soft_cap: float | None = None,
) -> Float[Array, 'B T V']:
  """Logits in float32, whatever the dtype of x; c tanh(z / c) with a cap c."""
  logits = jnp.einsum(
    'BTD,DV->BTV',
    x,
    head.astype(x.dtype),
    preferred_element_type=jnp.float32,
  )
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
