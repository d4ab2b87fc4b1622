"""Chunks of a cross entropy sum to the whole, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.cross_entropy import cross_entropy_sums, project
from tests.tolerances import tolerance


@pytest.mark.parametrize('chunk', [1, 4, 5, 11, 100])
def test_chunks_sum_to_the_whole(chunk):
  rng = np.random.default_rng(0)
  head = jnp.asarray(rng.normal(size=(6, 9)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(2, 11, 6)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 9, (2, 11)), jnp.int32)
  weights = jnp.asarray(rng.integers(0, 3, (2, 11)), jnp.float32)

  def whole(head, x):
    logits = project(x, head)
    nats = -jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(nats, labels[..., None], -1)[..., 0]
    right = logits.argmax(-1) == labels
    sums = dict(
      loss=(picked * weights).sum(),
      weight=weights.sum(),
      correct=(right * weights).sum(),
    )
    return sums['loss'], sums

  def chunked(head, x):
    sums = cross_entropy_sums(head, x, labels, weights, chunk=chunk)
    return sums['loss'], sums

  expected, actual = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(head, x)
    for f in (whole, chunked)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance('float32')),
    actual,
    expected,
  )
