"""Each softmax variant against its equation, from its own parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.attention import AttentionConfig, make_attention
from longctx.attention.context import Context
from longctx.ops.alibi import alibi_slopes
from tests.tolerances import tolerance

T, D, N, K, H, V = 13, 8, 4, 2, 4, 6
t, s = np.arange(T)[:, None], np.arange(T)[None, :]
CAUSAL = s <= t


def make_layer(layer, *, position_encoding='none', **kwargs):
  """A layer in which no parameter is zero or one, each in float32."""
  config = AttentionConfig(
    d_model=D,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    value_dim=V,
    position_encoding=position_encoding,
    **kwargs,
  )
  module = make_attention(layer, config, rngs=nnx.Rngs(0))
  graph, state = nnx.split(module)
  leaves, treedef = jax.tree.flatten(state)
  rng = np.random.default_rng(1)
  leaves = [
    x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves
  ]
  return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))


def numbers(param):
  return np.asarray(param[...], np.float64)


def inputs():
  return np.random.default_rng(2).normal(size=(1, T, D))


def split(x, heads):
  return x.reshape(T, heads, -1)


def project(layer, x, names=('query', 'key', 'value')):
  """q [T, N, H], k and v with a key head per query head."""
  q, k, v = (
    split(x[0] @ numbers(getattr(layer, name).kernel), heads)
    for name, heads in zip(names, (N, K, K), strict=True)
  )
  return q, np.repeat(k, N // K, 1), np.repeat(v, N // K, 1)


def logits(q, k):
  return np.einsum('tnh,snh->nts', q, k) / np.sqrt(q.shape[-1])


def softmax(z, allowed=CAUSAL, sink=0.0):
  p = np.where(allowed, np.exp(z), 0)
  return p / (p.sum(-1, keepdims=True) + sink)


def mix(p, v):
  return np.einsum('nts,snv->tnv', p, v)


def masked(allowed, layer, x):
  q, k, v = project(layer, x)
  return mix(softmax(logits(q, k), allowed), v)


def block_sparse(layer, x):
  rows = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
  return masked(CAUSAL & (rows[t // 4, s // 4] == 1), layer, x)


def longformer(layer, x, *, causal, apart):
  """Heads 0 and 1 read every token of a window of 2, 2 and 3 every other."""
  q, k, v = project(layer, x)
  order = CAUSAL if causal else np.ones((T, T), bool)
  is_global = (t < 2) | (s < 2)
  near = [abs(t - s) < 2] * 2 + [np.isin(abs(t - s), (0, 2))] * 2
  out = mix(softmax(logits(q, k), order & (is_global | near)), v)
  if apart:
    names = ('query_global', 'key_global', 'value_global')
    q, k, v = project(layer, x, names)
    out[:2] = mix(softmax(logits(q, k), order), v)[:2]
  return out


def softmax1(layer, x):
  q, k, v = project(layer, x)
  return mix(softmax(logits(q, k), sink=1.0), v)


def sink_logits(layer, x):
  q, k, v = project(layer, x)
  sink = np.exp(numbers(layer.sink_logits))
  return mix(softmax(logits(q, k), sink=sink[:, None, None]), v)


def sink_token(layer, x):
  q, k, v = project(layer, x)
  keys, values = (
    np.repeat(numbers(y), N // K, 1) for y in (layer.sink_key, layer.sink_value)
  )
  everywhere = np.ones((T, len(keys)), bool)
  p = softmax(
    logits(q, np.concatenate([keys, k])),
    np.concatenate([everywhere, CAUSAL & (t - s < 5)], 1),
  )
  return mix(p, np.concatenate([values, v]))


def output_gate(layer, x):
  gate = 1 / (1 + np.exp(-x[0] @ numbers(layer.gate.kernel)))
  return split(gate, N) * masked(CAUSAL, layer, x)


def differential(layer, x):
  q, k, v = project(layer, x)
  halves = [slice(None, H // 2), slice(H // 2, None)]
  first, second = (
    softmax(logits(q[..., half], k[..., half])) for half in halves
  )
  lambda_q, lambda_k = (numbers(y) for y in (layer.lambda_q, layer.lambda_k))
  weight = np.exp(lambda_q[0] @ lambda_k[0]) - np.exp(lambda_q[1] @ lambda_k[1])
  out = mix(first - (weight + 0.7) * second, v)
  norm = np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5)
  return (1 - 0.7) * out / norm * numbers(layer.head_norm.scale)


def forgetting(layer, x):
  q, k, v = project(layer, x)
  gate = x[0] @ numbers(layer.forget.kernel)
  gate += numbers(layer.forget.bias)
  c = np.cumsum(np.log(1 / (1 + np.exp(-gate))), 0).T
  return mix(softmax(logits(q, k) + c[:, :, None] - c[:, None, :]), v)


def sigmoid(layer, x, *, n):
  q, k, v = project(layer, x)
  bias = -np.log(n)
  if layer.learned_bias:
    bias = bias + numbers(layer.logit_bias)[:, None, None]
  return mix(CAUSAL / (1 + np.exp(-logits(q, k) - bias)), v)


def softpick(layer, x):
  q, k, v = project(layer, x)
  p = np.where(CAUSAL, np.exp(logits(q, k)) - 1, 0)
  return mix(np.maximum(p, 0) / np.abs(p).sum(-1, keepdims=True), v)


LONGFORMER = 'longformer(window=2, dilation=(1, 2), num_global=2'
EQUATIONS = {
  'dilated(window=3, dilation=3)': functools.partial(
    masked, np.isin(t - s, (0, 3, 6))
  ),
  'streaming(num_sinks=2, window=4)': functools.partial(
    masked, CAUSAL & ((s < 2) | (t - s < 4))
  ),
  "block_sparse(block=4, pattern=('1', '11', '011', '1001'))": block_sparse,
  f'{LONGFORMER})': functools.partial(longformer, causal=True, apart=False),
  f'{LONGFORMER}, causal=False)': functools.partial(
    longformer, causal=False, apart=False
  ),
  f'{LONGFORMER}, global_projections=True)': functools.partial(
    longformer, causal=True, apart=True
  ),
  f'{LONGFORMER}, global_projections=True, causal=False)': functools.partial(
    longformer, causal=False, apart=True
  ),
  'softmax1': softmax1,
  'sink_logits': sink_logits,
  'sink_token(num_sinks=2, window=5)': sink_token,
  'output_gate': output_gate,
  'output_gate(headwise=True)': output_gate,
  'differential(lambda_init=0.7)': differential,
  'forgetting': forgetting,
  'sigmoid': functools.partial(sigmoid, n=t + 1),
  'sigmoid(length=7, learned_bias=True)': functools.partial(sigmoid, n=7),
  'softpick': softpick,
}


@pytest.mark.parametrize('implementation', [None, 'reference'])
@pytest.mark.parametrize('layer', EQUATIONS)
def test_variant_equals_its_equation(layer, implementation, x64):
  module = make_layer(layer, implementation=implementation, dtype='float64')
  x = inputs()
  out = EQUATIONS[layer](module, x).reshape(T, -1)
  expected = out @ numbers(module.out.kernel)
  np.testing.assert_allclose(
    module(jnp.asarray(x))[0], expected, **tolerance('float64')
  )


def rotate(x, position):
  """One token's heads [N, H], as complex numbers."""
  frequency = 10000.0 ** (-np.arange(0, H, 2) / H)
  pairs = x[..., : H // 2] + 1j * x[..., H // 2 :]
  pairs = pairs * np.exp(1j * position * frequency)
  return np.concatenate([pairs.real, pairs.imag], -1)


def decode_with_cache(layer, x, num_sinks, window, position_encoding):
  """StreamingLLM as published: evict, then take positions in the cache."""
  q, k, v = project(layer, x)
  out, cache = [], []
  for now in range(T):
    cache.append(now)
    if len(cache) > num_sinks + window:
      cache.pop(num_sinks)
    slots = np.arange(len(cache))
    query, keys = q[now], k[cache]
    if position_encoding == 'rope':
      query = rotate(query, slots[-1])
      keys = np.stack([rotate(*pair) for pair in zip(keys, slots, strict=True)])
    z = np.einsum('nh,snh->ns', query, keys) / np.sqrt(H)
    if position_encoding == 'alibi':
      z -= np.asarray(alibi_slopes(N))[:, None] * (slots[-1] - slots)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    out.append(np.einsum('ns,snv->nv', p, v[cache]))
  return np.stack(out)


@pytest.mark.parametrize('position_encoding', ['rope', 'alibi'])
def test_cache_positions_equal_decoding_with_the_cache(position_encoding, x64):
  module = make_layer(
    'streaming(num_sinks=2, window=3, cache_positions=True)',
    position_encoding=position_encoding,
    dtype='float64',
  )
  x = inputs()
  out = decode_with_cache(module, x, 2, 3, position_encoding).reshape(T, -1)
  expected = out @ numbers(module.out.kernel)
  # Angles are multiples of 2^-32 of a turn.
  np.testing.assert_allclose(
    module(jnp.asarray(x))[0], expected, atol=1e-8, rtol=0
  )


def test_cache_positions_differ_from_true_ones():
  x = jnp.asarray(inputs(), jnp.float32)
  for position_encoding in ('rope', 'alibi'):
    outs = [
      make_layer(layer, position_encoding=position_encoding)(x)
      for layer in (
        'streaming(num_sinks=2, window=3, cache_positions=True)',
        'streaming(num_sinks=2, window=3)',
      )
    ]
    # Until the cache is full they are the same.
    np.testing.assert_allclose(
      outs[0][:, :5], outs[1][:, :5], **tolerance('float32')
    )
    assert not np.allclose(outs[0][:, 5:], outs[1][:, 5:], atol=1e-3)


def test_cache_positions_hold_in_each_document():
  layer = 'streaming(num_sinks=2, window=3, cache_positions=True)'
  for position_encoding in ('rope', 'alibi'):
    module = make_layer(layer, position_encoding=position_encoding)
    x = jnp.asarray(inputs(), jnp.float32)
    ids = jnp.repeat(jnp.array([3, 1]), jnp.array([4, 9]))[None]
    run = jax.jit(lambda x, ids, module=module: module(x, segment_ids=ids))
    packed = run(x, ids)
    alone = [run(part, None) for part in (x[:, :4], x[:, 4:])]
    np.testing.assert_allclose(
      packed, jnp.concatenate(alone, 1), **tolerance('float32')
    )


def test_bigbird_is_window_global_and_random_blocks():
  layer = make_layer('bigbird(window=2, num_global=1, block=2, num_random=1)')
  read = layer.mask.dense(T, T)
  known = CAUSAL & ((t - s < 2) | (s < 1))
  assert read[known].all() and not read[~CAUSAL].any()
  # One block of two per row of blocks, and nothing else.
  extra = read & ~known
  for row in range(T):
    blocks = {int(column) // 2 for column in np.flatnonzero(extra[row])}
    assert len(blocks) <= 1
  assert extra.any()


def test_bidirectional_bigbird_draws_in_both_directions():
  layer = make_layer(
    'bigbird(window=1, num_global=1, block=1, num_random=2, causal=False, '
    'num_blocks=13)'
  )
  read = layer.mask.dense(T, T)
  assert read[0].all() and read[:, 0].all()
  assert np.triu(read[1:, 1:], 1).any() and np.tril(read[1:, 1:], -1).any()
  other = make_layer(
    'bigbird(window=1, num_global=1, block=1, num_random=2, causal=False, '
    'num_blocks=13, seed=1)'
  )
  assert (read != other.mask.dense(T, T)).any()


def test_longformer_counts_keys_and_pairs_of_each_head():
  layer = make_layer('longformer(window=3, dilation=(1, 4))')
  # Heads 0 and 1 share key head 0 and dilation 1, the others have dilation 4.
  per_slot = (H + V) * 4
  assert layer.state_bytes(T, 'float32') == (3 + 9) * per_slot
  pairs = 2 * int((CAUSAL & (t - s < 3)).sum())
  pairs += 2 * int(np.isin(t - s, (0, 4, 8)).sum())
  assert layer.mixing_flops(T) == 2 * (H + V) * pairs


def test_longformer_heads_of_one_dilation_may_share_key_heads_unevenly(x64):
  layer = 'longformer(window=2, dilation=(1, 3, 1, 1))'
  module = make_layer(layer, dtype='float64')
  x = inputs()
  near = [CAUSAL & (t - s < 2)] * 4
  near[1] = np.isin(t - s, (0, 3))
  expected = masked(near, module, x).reshape(T, -1)
  np.testing.assert_allclose(
    module(jnp.asarray(x))[0],
    expected @ numbers(module.out.kernel),
    **tolerance('float64'),
  )


def test_longformer_heads_of_different_dilations_drop_different_weights():
  layer = make_layer(
    'longformer(window=9, dilation=(1, 2))', attention_dropout=0.5
  )
  x = jnp.ones((1, 1, D))
  qkv = layer.project(x, Context())
  # One token: a head gives its value or nothing, by one draw.
  kept = []
  for i in range(12):
    context = Context(dropout_rate=0.5, dropout_key=jax.random.key(i))
    out = layer.attend(qkv, context)
    kept.append(np.asarray(out[0, 0] != 0).any(-1))
  kept = np.stack(kept)
  assert 0 < kept.mean() < 1
  for head in range(N):
    others = np.delete(kept, head, axis=1)
    assert (others != kept[:, [head]]).any(0).all()


def test_longformer_takes_weights_by_name_and_shape():
  layer = make_layer(
    'longformer(num_global=1, global_projections=True, use_bias=True)'
  )
  rng = np.random.default_rng(0)
  state = {}
  for name, heads in (('query', N * H), ('key', K * H), ('value', K * V)):
    for full_name in (name, f'{name}_global'):
      state[f'{full_name}.weight'] = rng.normal(size=(heads, D))
      state[f'{full_name}.bias'] = rng.normal(size=heads)
  layer.load_hugging_face(state)
  np.testing.assert_allclose(
    layer.key_global.kernel[...],
    state['key_global.weight'].T,
    **tolerance('float32'),
  )
  with pytest.raises(ValueError, match='query: '):
    layer.load_hugging_face({**state, 'query.weight': np.zeros((D, N * H + 1))})
  with pytest.raises(ValueError, match=r"\['value.bias'\] must be in both"):
    layer.load_hugging_face(
      {name: x for name, x in state.items() if name != 'value.bias'}
    )
  without = make_layer('longformer(num_global=1, global_projections=True)')
  with pytest.raises(ValueError, match='has no query with a bias'):
    without.load_hugging_face(state)


def test_sink_logits_start_as_softmax1():
  x = jnp.asarray(inputs(), jnp.float32)
  config = AttentionConfig(
    d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=V
  )
  outs = [
    make_attention(layer, config, rngs=nnx.Rngs(0))(x)
    for layer in ('sink_logits', 'softmax1')
  ]
  np.testing.assert_allclose(*outs, **tolerance('float32'))


def test_sink_token_does_not_depend_on_where_a_document_begins():
  module = make_layer('sink_token', position_encoding='rope')
  x = jnp.asarray(inputs(), jnp.float32)
  near = module(x)
  far = module(x, positions=jnp.arange(T) + 1000)
  np.testing.assert_allclose(near, far, **tolerance('float32'))


def test_forgetting_keeps_its_precision_over_many_tokens(x64):
  length = 1 << 14
  module = make_layer('forgetting', dtype='float32')
  exact = make_layer('forgetting', dtype='float64')
  x = np.random.default_rng(3).normal(size=(1, length, D))
  last = jnp.arange(length - 8, length)[None]
  out = module(jnp.asarray(x, jnp.float32), query_indices=last)
  expected = exact(jnp.asarray(x), query_indices=last)
  # Sums of 12,000 nats, exact to 6e-8 of them.
  np.testing.assert_allclose(out, expected, atol=1e-3, rtol=0)


def test_differential_has_the_parameters_and_state_of_full_attention():
  differential, full = (make_layer(name) for name in ('differential', 'full'))

  def matrices(layer):
    _, params = nnx.split(layer, nnx.Param)
    return sum(p.size for p in jax.tree.leaves(params) if p.size >= D * D)

  assert matrices(differential) == matrices(full)
  for dtype in ('float32', 'bfloat16'):
    states = [y.state_bytes(T, dtype) for y in (differential, full)]
    assert states[0] == states[1]
  pairs = T * (T + 1) // 2
  assert differential.mixing_flops(T) == 2 * N * (H + 2 * V) * pairs


def test_forgetting_keeps_a_sum_per_key_and_head_and_the_last_one():
  layer, full = (make_layer(name) for name in ('forgetting', 'full'))
  extra = layer.state_bytes(T, 'bfloat16') - full.state_bytes(T, 'bfloat16')
  assert extra == (T + 1) * N * 4


@pytest.mark.parametrize(
  ('layer', 'message'),
  [
    ('bigbird(causal=False)', 'num_blocks=None'),
    ('bigbird(window=0)', 'window=0 must be at least 1'),
    ("block_sparse(pattern=('1', '12'))", "rows of '0' and '1'"),
    ('differential(lambda_init=1.0)', 'lambda_init=1.0 must be in'),
    ('longformer(dilation=(1, 2, 3))', 'as many as divide num_heads=4'),
    ('longformer(global_projections=True)', 'would never be used'),
    ('sigmoid(length=0)', 'length=0 must be at least 1'),
    ('sink_logits(window=0)', 'window=0 must be at least 1'),
    ('sink_token(num_sinks=0)', 'num_sinks=0 must be at least 1'),
    ('streaming(cache_positions=True)', 'no positions to count'),
  ],
)
def test_wrong_arguments_are_named(layer, message):
  with pytest.raises(ValueError, match=message):
    make_layer(layer)
