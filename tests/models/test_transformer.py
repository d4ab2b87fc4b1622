"""The decoder: losses, layer patterns, precision, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.attention.config import POSITION_ENCODINGS
from longctx.models import Transformer, TransformerConfig, validate
from longctx.models import transformer as model_lib
from longctx.parallel import Placement, make_mesh
from longctx.parallel.layout import SequenceLayout

SMALL = TransformerConfig(
  vocab_size=11,
  d_model=16,
  num_heads=2,
  num_kv_heads=1,
  layers=('full', 'linear'),
  mlp_dim=24,
  short_conv=3,
)


def build(config=SMALL, **changes):
  return Transformer(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def batch(B=2, T=13, V=11):
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  weights = jnp.asarray(rng.integers(0, 3, (B, T)), jnp.float32)
  return tokens, labels, weights


def direct_loss(model, tokens, labels, weights):
  logp = jax.nn.log_softmax(model(tokens))
  nll = -jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
  hit = model(tokens).argmax(-1) == labels
  return (nll * weights).sum(), weights.sum(), (hit * weights).sum()


def sums_and_gradient(model, loss):
  """loss(model, *data) -> sums, and the gradient of the first of them."""
  graph, params = nnx.split(model)

  def run(params):
    sums = loss(nnx.merge(graph, params), *batch())
    return sums[0], sums

  gradient, sums = jax.jit(jax.grad(run, has_aux=True))(params)
  return sums, gradient


@functools.cache
def direct():
  return sums_and_gradient(build(), direct_loss)


@pytest.mark.parametrize('chunk', [1, 4, 13, 50])
def test_chunked_loss_equals_direct_loss_and_its_gradient(chunk):
  def chunked(model, *data):
    sums = model.loss(*data)
    return sums['loss'], sums['weight'], sums['correct']

  sums, gradient = sums_and_gradient(build(logits_chunk=chunk), chunked)
  expected_sums, expected = direct()
  np.testing.assert_allclose(sums[0], expected_sums[0], rtol=1e-5)
  assert sums[1:] == expected_sums[1:]
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), gradient, expected
  )


def test_loss_never_holds_all_the_logits():
  T, V = 512, 1024
  model = build(vocab_size=V, layers=('linear',), logits_chunk=32, mlp_dim=0)
  graph, params = nnx.split(model)

  def loss(params, tokens):
    weights = jnp.ones(tokens.shape)
    return nnx.merge(graph, params).loss(tokens, tokens, weights)['loss']

  tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
  compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * V


def test_only_full_remat_runs_attention_forward_twice():
  def loops(remat):
    graph, params = nnx.split(build(remat=remat))

    loss = lambda p: nnx.merge(graph, p).loss(*batch())['loss']
    return str(jax.make_jaxpr(jax.grad(loss))(params)).count('while[')

  once, full = loops('none'), loops('full')
  assert loops('dots') == loops('dots_no_batch') == once < full


@pytest.mark.parametrize('remat', list(model_lib.REMAT_POLICIES))
def test_remat_changes_no_gradient(remat):
  data = batch()

  def gradient(remat):
    graph, params = nnx.split(build(remat=remat))
    loss = lambda p: nnx.merge(graph, p).loss(*data)['loss']
    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
    gradient(remat),
    gradient('none'),
  )


# Rows read at other places and in any order, one of them at fewer.
INDICES = np.array([[11, 0, 5], [4, 7, -1]], np.int32)
PLACES = {
  'default': {},
  'packed': {'segment_ids': np.repeat([[1, 2], [3, 1]], [5, 8], axis=1)},
  'packed-given': {
    'positions': np.array([[*range(5), *range(8)], range(12, -1, -1)]),
    'segment_ids': np.repeat([[1, 2], [3, 1]], [5, 8], axis=1),
  },
}


@pytest.mark.parametrize('places', PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
  ('variant', 'position_encoding'),
  # Every other variant is read at places as a layer, in tests/attention.
  [
    *(('full', encoding) for encoding in POSITION_ENCODINGS),
    ('linear', 'rope'),
  ],
)
def test_reading_at_places_equals_reading_everywhere(
  variant, position_encoding, places
):
  model = build(
    layers=(variant, variant),
    position_encoding=position_encoding,
    max_positions=13,
  )
  tokens, labels, _ = batch()
  weights = np.zeros((2, 13), np.float32)
  weights[0, INDICES[0]], weights[1, INDICES[1, :2]] = (1, 2, 0.5), (3, 1)
  places = jax.tree.map(jnp.asarray, places)
  graph, params = nnx.split(model)

  def loss(params, query_indices):
    sums = nnx.merge(graph, params).loss(
      tokens,
      labels,
      jnp.asarray(weights),
      query_indices=query_indices,
      **places,
    )
    return sums['loss'], sums

  grad = jax.jit(jax.grad(loss, has_aux=True))
  actual = grad(params, jnp.asarray(INDICES))
  expected = grad(params, None)
  assert actual[1]['weight'] == expected[1]['weight'] == 7.5
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5, rtol=1e-5),
    actual,
    expected,
  )


def test_last_block_and_head_are_computed_where_they_are_read_alone():
  T = 512
  model = build(vocab_size=1024, layers=('full',), mlp_dim=256)
  graph, params = nnx.split(model)

  def loss(params, tokens, query_indices):
    weights = jnp.ones(tokens.shape)
    return nnx.merge(graph, params).loss(
      tokens, tokens, weights, query_indices=query_indices
    )

  def flops(query_indices):
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    compiled = jax.jit(loss).lower(params, tokens, query_indices).compile()
    return compiled.cost_analysis()['flops']

  assert flops(jax.ShapeDtypeStruct((1, 4), jnp.int32)) < flops(None) / 10


@pytest.mark.parametrize(
  'position_encoding', ['rope', 'alibi', 'learned', 'none']
)
def test_packed_documents_equal_separate_ones(position_encoding):
  # The sinks of `streaming` are those of the document.
  layers = ('full', 'streaming(num_sinks=1, window=2)')
  if position_encoding != 'alibi':
    layers += ('linear', "linear(feature_map='taylor', normalize=False)")
  model = build(
    layers=layers, position_encoding=position_encoding, max_positions=16
  )
  tokens, _, _ = batch(B=1)
  segment_ids = jnp.array([[1] * 5 + [2] * 8])
  run = jax.jit(lambda tokens, **places: model(tokens, **places))
  packed = run(tokens, segment_ids=segment_ids)
  first, second = run(tokens[:, :5]), run(tokens[:, 5:])
  separate = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(packed, separate, atol=1e-5)


@pytest.mark.parametrize('position_encoding', ['rope', 'learned'])
def test_packed_rows_on_a_mesh_equal_those_on_one_device(position_encoding):
  model = build(
    layers=('streaming(num_sinks=1, window=2)', 'linear'),
    position_encoding=position_encoding,
    max_positions=16,
  )
  graph, params = nnx.split(model)
  names = ('tokens', 'labels', 'weights')
  arrays = dict(zip(names, map(np.asarray, batch()), strict=True))
  arrays['segment_ids'] = np.repeat([[1, 2], [3, 1]], [5, 8], axis=1)

  def gradient(arrays, placement=None):
    def loss(params):
      return nnx.merge(graph, params).loss(**arrays, placement=placement)[
        'loss'
      ]

    return jax.jit(jax.value_and_grad(loss))(params)

  # One row for each device of data, and a length that has to be padded.
  layout = SequenceLayout('zigzag', 13, 2)
  placement = Placement(make_mesh(data=2, seq=2), layout, 'ring')
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5, rtol=1e-5),
    gradient(placement.put(arrays), placement),
    gradient(jax.device_put(arrays)),
  )


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
  exact, model = build(), build(dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
    jnp.dtype('float32')
  }
  tokens, labels, weights = batch()
  assert model.embed(tokens).dtype == jnp.bfloat16
  assert model.hidden(model.embed(tokens)).dtype == jnp.bfloat16
  assert model(tokens).dtype == jnp.float32
  np.testing.assert_allclose(model(tokens), exact(tokens), atol=0.05)
  loss = model.loss(tokens, labels, weights)['loss']
  expected = exact.loss(tokens, labels, weights)['loss']
  np.testing.assert_allclose(loss, expected, rtol=1e-2)


def test_layer_arguments_replace_what_the_model_shares():
  model = build(
    layers=(
      'sliding_window(window=4, num_kv_heads=2)',
      "linear(feature_map='taylor', head_dim=4, position_encoding='none')",
    )
  )
  window, linear = (block.attention for block in model.blocks)
  assert window.mask.left == 3
  assert window.config.num_kv_heads == 2
  assert linear.config.head_dim == 4
  assert linear.config.value_dim == 8
  assert linear.config.position_encoding == 'none'


def test_untied_head_and_embedding_are_separate():
  tied, untied = build(), build(tied_head=False)
  assert not hasattr(tied, 'head')
  assert untied.head[...].shape == (16, 11)
  assert untied(batch()[0]).shape == (2, 13, 11)


def test_state_bytes_tell_caches_from_states():
  shared = dict(layers=('full',), num_kv_heads=2, short_conv=0)
  full = build(**shared)
  assert full.state_bytes(100) == 100 * 2 * (8 + 8) * 4
  assert full.state_bytes(100, 'bfloat16') == 100 * 2 * (8 + 8) * 2
  window = build(**{**shared, 'layers': ('sliding_window(window=10)',)})
  assert window.state_bytes(100) == 10 * 2 * (8 + 8) * 4
  linear = build(**{**shared, 'layers': ('linear',)})
  assert linear.state_bytes(100) == linear.state_bytes(10**6) == 2 * 8 * 9 * 4


def test_flops_grow_as_the_variant_says():
  def mixing(layer, T):
    return build(layers=(layer,)).blocks[0].attention.mixing_flops(T)

  assert 3.9 < mixing('full', 2048) / mixing('full', 1024) < 4
  assert mixing('linear', 2048) / mixing('linear', 1024) == 2
  window = 'sliding_window(window=16)'
  assert 2 < mixing(window, 2048) / mixing(window, 1024) < 2.02


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    (
      {'layers': ('fulll',)},
      ValueError,
      "unknown variant 'fulll'; did you mean full. known: ",
    ),
    ({'layers': ()}, ValueError, 'layers is empty'),
    ({'layers': ('full,linear',)}, ValueError, 'quote the layers'),
    ({'layers': ('full(window=3)',)}, ValueError, "takes no 'window'"),
    ({'layers': ('full(3)',)}, ValueError, 'cannot read the layer'),
    ({'layers': ('sliding_window(window=0)',)}, ValueError, 'window=0'),
    ({'layers': ("linear(feature_map='x')",)}, ValueError, 'elu'),
    (
      {'num_heads': 3, 'd_model': 16},
      ValueError,
      'multiple of model.num_heads=3: 15 or 18',
    ),
    ({'num_heads': 4, 'num_kv_heads': 3}, ValueError, 'num_kv_heads=3'),
    ({'head_dim': 7}, ValueError, 'even head_dim'),
    (
      {'position_encoding': 'ropy'},
      ValueError,
      "unknown model.position_encoding='ropy'; did you mean rope",
    ),
    ({'position_encoding': 'alibi'}, NotImplementedError, 'ALiBi'),
    ({'position_encoding': 'learned'}, ValueError, 'needs max_positions'),
    (
      {'position_encoding': 'learned', 'max_positions': 8},
      ValueError,
      'max_positions >= 12',
    ),
    ({'remat': 'some'}, ValueError, "unknown model.remat='some'"),
    (
      {'dtype': 'float16'},
      ValueError,
      "unknown model.dtype='float16', which overflows",
    ),
    ({'mlp_dim': -1}, ValueError, 'mlp_dim=-1'),
    ({'vocab_size': None}, ValueError, 'vocab_size=None'),
  ],
)
def test_what_does_not_fit_is_refused_before_compiling(changes, error, message):
  with pytest.raises(error, match=message):
    validate(dataclasses.replace(SMALL, **changes), seq_len=12)


def test_validate_accepts_what_works():
  validate(SMALL, seq_len=12)
