"""Scalable softmax: how many keys count, and what the scaling holds."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import masks
from longctx.attention import AttentionConfig, make_attention
from longctx.attention.base import QKV
from longctx.attention.context import Context
from longctx.attention.segments import count_keys
from tests.tolerances import tolerance

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [5, 3, 3, 5, 5, 3, 9]])
POSITIONS = {
  'default': None,
  'shared': np.array([6, 0, 5, 1, 4, 2, 3]),
  'per-row': np.array([[0, 1, 2, 0, 1, 2, 3], [7, 5, 6, 8, 9, 7, 0]]),
}


@pytest.mark.parametrize('positions', POSITIONS.values(), ids=POSITIONS)
def test_count_is_that_of_the_mask_within_each_document(positions):
  places = np.arange(7) if positions is None else positions
  counted = count_keys(jnp.asarray(places), jnp.asarray(SEGMENTS))
  for row in range(2):
    own = np.broadcast_to(places, (2, 7))[row]
    allowed = masks.Causal().allowed(own[:, None], own[None])
    allowed &= SEGMENTS[row][:, None] == SEGMENTS[row][None]
    np.testing.assert_array_equal(counted[row], allowed.sum(1))


def test_count_without_documents_is_the_position_plus_one():
  order = jnp.array([4, 0, 3, 1, 2])
  counted = count_keys(order, None)
  np.testing.assert_array_equal(counted, order + 1)
  counted = count_keys(jnp.arange(5), None)
  np.testing.assert_array_equal(counted, [1, 2, 3, 4, 5])


def test_logits_are_those_of_full_attention_times_log_n():
  config = AttentionConfig(
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    value_dim=4,
    implementation='reference',
  )
  layer = make_attention(
    'scalable_softmax(initial_scale=0.5)', config, rngs=nnx.Rngs(0)
  )
  full = make_attention('full', config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 6, n, 4))) for n in (2, 1, 1))
  qkv = QKV(q, k, v, jnp.zeros((1, 6, 8)))
  context = Context(implementation='reference')
  out = layer.attend(qkv, context)
  for n in range(1, 7):
    scaled = full.attend(qkv._replace(q=q * 0.5 * np.log(n)), context)
    np.testing.assert_allclose(
      out[:, n - 1], scaled[:, n - 1], **tolerance('float32')
    )


def test_one_key_keeps_its_weight_among_any_number_of_others():
  config = AttentionConfig(
    d_model=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    value_dim=1,
    position_encoding='none',
  )
  layer = make_attention(
    'scalable_softmax(initial_scale=1.0)', config, rngs=nnx.Rngs(0)
  )
  full = make_attention('full', config, rngs=nnx.Rngs(0))
  found = {}
  for T in (100, 10_000):
    q = jnp.full((1, T, 1, 1), 2.0)
    k = v = jnp.zeros((1, T, 1, 1)).at[0, 7].set(1.0)
    for name, module in (('scaled', layer), ('full', full)):
      context = Context(query_indices=jnp.full((1, 1), T - 1))
      out = module.attend(QKV(q, k, v, jnp.zeros((1, T, 2))), context)
      found[name, T] = float(out[0, 0, 0, 0])
  assert found['scaled', 100] > 0.99
  assert found['scaled', 10_000] > 0.999
  assert found['full', 100] < 0.1
  assert found['full', 10_000] < 0.001
