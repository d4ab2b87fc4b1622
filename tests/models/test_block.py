"""Blocks of other people's models: norms, biases, gates and caps at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.decoding import cache as cache_lib
from longctx.models import Transformer, TransformerConfig
from longctx.models.activations import ACTIVATIONS
from longctx.parallel import Placement, make_mesh
from longctx.parallel.layout import SequenceLayout
from tests.tolerances import tolerance

FAST = {'xla_backend_optimization_level': 0}

# That of the layers is in tests/attention, by capability.
FULL = TransformerConfig(
  vocab_size=11,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  layers=('sliding_window(window=5, rope_base=100.0)', 'full'),
  mlp_dim=24,
  mlp='swiglu',
  mlp_bias=True,
  norm='layer',
  norm_eps=1e-3,
  norm_position='both',
  qk_norm='width',
  qkv_bias=True,
  out_bias=True,
  rotary_dim=2,
  rope_scaling='llama3(factor=4.0, original_context=8)',
  attention_scale=0.4,
  attention_soft_cap=3.0,
  embedding_scale=2.0,
  logits_soft_cap=2.0,
)
CASES = {
  'both': FULL,
  'parallel': dataclasses.replace(
    FULL, parallel_residual=True, norm_position='before', norm='rms'
  ),
  'after': dataclasses.replace(
    FULL, norm_position='after', mlp='geglu_exact', tied_head=False
  ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 16)))


def build(config):
  """(graph, params) of a model, no parameter 0 or 1."""
  graph, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
  leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
  rng = np.random.default_rng(1)
  moved = [x + 0.2 * rng.normal(size=x.shape).astype('float32') for x in leaves]
  return graph, jax.tree.unflatten(tree, moved)


def loss_and_gradient(graph, params, tokens, **fields):
  @jax.jit
  def run(params, tokens):
    weights = jnp.ones(tokens.shape)
    model = nnx.merge(graph, params)
    return model.loss(tokens, (tokens + 1) % 11, weights, **fields)['loss']

  return jax.value_and_grad(run)(params, tokens)


@pytest.mark.parametrize('case', CASES)
def test_mesh_gives_the_loss_and_the_gradient_of_one_device(case):
  graph, params = build(CASES[case])
  mesh = make_mesh(data=2, seq=2, model=2)
  placement = Placement(mesh, SequenceLayout('zigzag', 16, 2), 'ring')
  spread = jax.device_put(params, placement.state_shardings(params, fsdp=True))
  tokens = jax.device_put(placement.layout.apply(TOKENS), placement.sharding)
  actual = loss_and_gradient(graph, spread, tokens, placement=placement)
  expected = loss_and_gradient(graph, params, TOKENS)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-4),
    actual,
    expected,
  )


@pytest.mark.parametrize('case', CASES)
def test_chunks_and_tokens_give_the_logits_of_the_parallel_pass(case):
  model = nnx.merge(*build(CASES[case]))
  expected = jax.jit(lambda tokens: model(tokens))(TOKENS)
  cache, found = cache_lib.init(model, batch_size=2, capacity=16), []
  extend = jax.jit(lambda c, tokens: cache_lib.extend(model, c, tokens))
  for begin, end in ((0, 7), (7, 14), (14, 15), (15, 16)):
    logits, cache = extend(cache, TOKENS[:, begin:end])
    found.append(logits)
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), expected, **tolerance('float32')
  )


def test_packed_documents_are_read_as_if_alone():
  model = nnx.merge(*build(FULL))
  ids = jnp.repeat(jnp.array([[1, 2], [1, 1]]), 8, axis=1)
  packed = model(TOKENS, segment_ids=ids)
  alone = model(TOKENS[:1, 8:])
  np.testing.assert_allclose(packed[:1, 8:], alone, **tolerance('float32'))


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_flops_count_the_products_of_the_mlp(name):
  config = dataclasses.replace(FULL, mlp=name, mlp_bias=False)
  model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  _, params = nnx.split(model.blocks[0].mlp, nnx.Param)
  sizes = [x.size for x in jax.tree.leaves(params)]
  assert model.blocks[0].mlp.flops(10) == 2 * 10 * sum(sizes)
  assert len(sizes) == (3 if ACTIVATIONS[name].is_gated else 2)


def test_caps_bound_logits():
  model = nnx.merge(*build(FULL))
  assert jnp.abs(model(100 * TOKENS % 11)).max() <= 2.0


def test_defaults_add_no_parameter():
  config = TransformerConfig(vocab_size=5, d_model=8, num_heads=2, mlp_dim=8)
  model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  assert sum(x.ndim == 1 for x in jax.tree.leaves(nnx.state(model))) == 5
  assert not any(
    'bias' in jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'mlp': 'swish'}, "unknown model.mlp='swish'"),
    ({'norm_eps': 0.0}, r'norm_eps=0.0 must be in \(0'),
    ({'rotary_dim': 3}, 'rotary_dim=3 must be even'),
    ({'rope_scaling': 'yran(factor=2.0)'}, 'rope_scaling: unknown scaling'),
    ({'logits_soft_cap': -1.0}, 'logits_soft_cap=-1.0 must be above 0'),
  ],
)
def test_wrong_fields_say_what_to_change(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(FULL, **changes)


def test_a_part_that_is_wider_than_a_head_is_refused():
  with pytest.raises(ValueError, match='at most head_dim=4'):
    Transformer(dataclasses.replace(FULL, rotary_dim=6), rngs=nnx.Rngs(0))


def test_what_a_layer_without_rope_ignores_is_refused():
  config = dataclasses.replace(
    FULL, layers=("full(position_encoding='none', rope_base=10.0)",)
  )
  with pytest.raises(ValueError, match=r'nothing that .*rope_base'):
    Transformer(config, rngs=nnx.Rngs(0))
