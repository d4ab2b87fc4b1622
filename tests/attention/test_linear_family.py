"""Linear recurrences as layers, each against its equation, step by step.

An equation is written here in numpy float64, one token and one head at a time,
from the parameters of the module itself.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import tasks
from longctx.attention import AttentionConfig, make_attention
from longctx.attention.norms import (
  initial_dt_bias,
  initial_log_rates,
  l2_normalize,
  layer_norm,
  rms_norm,
)
from longctx.attention.recurrence import Recurrence
from longctx.models import TransformerConfig, validate
from longctx.ops import recurrence as recurrences
from longctx.training import runs, steps
from tests.tiny import tiny_config
from tests.tolerances import tolerance

T, N, K, H, V, D = 13, 4, 2, 4, 6, 16
# Documents of one token and more, which end inside of chunks.
LENGTHS = (5, 1, 7)


def make_layer(layer, *, dtype='float64', implementation=None, **config):
  """A layer whose parameters have none of the values that they start with."""
  sizes = dict(num_heads=N, num_kv_heads=K, head_dim=H, value_dim=V)
  config = AttentionConfig(
    d_model=D,
    dtype=dtype,
    param_dtype='float64' if dtype == 'float64' else 'float32',
    implementation=implementation,
    **{**sizes, 'position_encoding': 'none', 'short_conv': 3, **config},
  )
  made = make_attention(layer, config, rngs=nnx.Rngs(0))
  graph, params = nnx.split(made, nnx.Param)
  leaves, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  leaves = [x + 0.2 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))


def make_inputs():
  return np.random.default_rng(1).normal(size=(1, T, D))


def parameters(layer):
  """Arrays by their names in the module, as in 'query.kernel', float64."""
  params = nnx.to_pure_dict(nnx.split(layer, nnx.Param)[1])
  return {
    '.'.join(key.key for key in path): np.asarray(x, np.float64)
    for path, x in jax.tree.leaves_with_path(params)
  }


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log1p(np.exp(x))


def rms(x):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def unit(x):
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def centred(x):
  return x - x.mean(-1, keepdims=True)


def project(p, x, activation=lambda x: x, head_dim=H):
  """q, k and v [T, N, .] of a document, one key head per query head."""
  projected = []
  for name, width in (('query', head_dim), ('key', head_dim), ('value', V)):
    y, taps = x @ p[f'{name}.kernel'], p[f'{name}_conv']
    y = np.stack(
      [
        sum(taps[2 - i] * y[t - i] for i in range(3) if t >= i)
        for t in range(len(y))
      ]
    )
    y = activation(y).reshape(len(y), -1, width)
    projected.append(np.repeat(y, N // y.shape[1], axis=1))
  return projected


def recur(q, k, v, *, log_decay=None, beta=None):
  """One state per head, one token after another; [T, N, V]."""
  out = np.zeros(v.shape)
  for n in range(N):
    state = np.zeros((q.shape[-1], v.shape[-1]))
    for t in range(len(q)):
      if log_decay is not None:
        state = np.exp(np.atleast_1d(log_decay[t, n]))[:, None] * state
      if beta is None:
        state = state + np.outer(k[t, n], v[t, n])
      else:
        erase = np.eye(q.shape[-1]) - beta[t, n] * np.outer(k[t, n], k[t, n])
        state = erase @ state + beta[t, n] * np.outer(k[t, n], v[t, n])
      out[t, n] = q[t, n] @ state
  return out


def normalized(q, k, v):
  return recur(q, k, v) / recur(q, k, np.ones_like(v))


def heads(x):
  return x.reshape(len(x), N, -1)


def retention(p, x):
  gamma = 1 - 2.0 ** (-5 - np.arange(N))
  log_decay = np.tile(np.log(gamma), (len(x), 1))
  out = recur(*project(p, x), log_decay=log_decay) / math.sqrt(H)
  return rms(centred(out)) * heads(silu(x @ p['gate.kernel']))


def gla(p, x):
  logits = x @ p['decay_down.kernel'] @ p['decay_up.kernel']
  alpha = sigmoid(logits + p['decay_up.bias']) ** (1 / 16)
  out = recur(*project(p, x), log_decay=heads(np.log(alpha))) / math.sqrt(H)
  return rms(centred(out)) * heads(silu(x @ p['gate.kernel']))


def mamba2(p, x):
  q, k, v = project(p, x, silu)
  dt = softplus(x @ p['dt.kernel'] + p['dt_bias'])
  log_decay = -np.exp(p['log_rate']) * dt
  y = recur(q, k, dt[..., None] * v, log_decay=log_decay)
  y = (y + p['skip'][:, None] * v) * heads(silu(x @ p['gate.kernel']))
  # Heads 0 and 1 share a key head, and a norm, and so do 2 and 3.
  groups = rms(y.reshape(len(x), K, -1)).reshape(len(x), -1)
  return heads(groups * p['norm_scale'])


def lightning(p, x):
  slopes = 2.0 ** (-8 * np.arange(1, N + 1) / N) * (1 - 0.25 + 1e-5)
  out = recur(*project(p, x, silu), log_decay=np.tile(-slopes, (len(x), 1)))
  gate = sigmoid(x @ p['gate_down.kernel'] @ p['gate_up.kernel'])
  return heads(rms(out.reshape(len(x), -1)) * gate)


def deltanet(p, x):
  q, k, v = project(p, x, silu)
  out = recur(unit(q), unit(k), v, beta=sigmoid(x @ p['beta.kernel']))
  return rms(out / math.sqrt(H)) * p['norm_scale']


def gated_deltanet(p, x):
  q, k, v = project(p, x, silu)
  dt = softplus(x @ p['dt.kernel'] + p['dt_bias'])
  log_decay = -np.exp(p['log_rate']) * dt
  beta = sigmoid(x @ p['beta.kernel'])
  out = recur(unit(q), unit(k), v, log_decay=log_decay, beta=beta)
  gate = heads(silu(x @ p['gate.kernel']))
  return rms(out / math.sqrt(H)) * p['norm_scale'] * gate


def kda(p, x):
  q, k, v = project(p, x, silu)
  dt = softplus(
    x @ p['decay_down.kernel'] @ p['decay_up.kernel'] + p['dt_bias']
  )
  log_decay = -np.exp(p['log_rate'])[:, None] * heads(dt)
  beta = sigmoid(x @ p['beta.kernel'])
  out = recur(unit(q), unit(k), v, log_decay=log_decay, beta=beta)
  gate = x @ p['gate_down.kernel'] @ p['gate_up.kernel'] + p['gate_up.bias']
  return rms(out / math.sqrt(H)) * p['norm_scale'] * heads(sigmoid(gate))


def based(p, x):
  d = 2
  q, k, v = project(p, x, head_dim=d)
  logits = np.einsum('TNH,SNH->NTS', q, k) / math.sqrt(d)
  weights = np.tril(1 + logits + logits**2 / 2)
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('NTS,SNV->TNV', weights, v)


def window_linear(p, x):
  q, k, v = project(p, x)
  far = normalized(*(np.where(y > 0, y + 1, np.exp(y)) for y in (q, k)), v)
  logits = np.einsum('TNH,SNH->NTS', q, k) / math.sqrt(H)
  distance = np.arange(len(x))[:, None] - np.arange(len(x))
  weights = np.exp(logits) * ((distance >= 0) & (distance < 3))
  weights /= weights.sum(-1, keepdims=True)
  near = np.einsum('NTS,SNV->TNV', weights, v)
  share = sigmoid(p['mix_logit'])[:, None]
  return share * far + (1 - share) * near


def hedgehog(p, x):
  q, k, v = project(p, x)
  for side in ('query', 'key'):
    kernel = p[f'{side}_features.parameters.kernel'].reshape(-1, H, H)
    bias = p[f'{side}_features.parameters.bias'].reshape(-1, H)
    kernel, bias = (np.repeat(y, N // len(y), axis=0) for y in (kernel, bias))
    y = np.einsum('TNH,NHP->TNP', q if side == 'query' else k, kernel) + bias
    halves = [np.exp(y), np.exp(-y)]
    y = np.concatenate([y / y.sum(-1, keepdims=True) for y in halves], axis=-1)
    q, k = (y, k) if side == 'query' else (q, y)
  return normalized(q, k, v)


EQUATIONS = {
  'retention(chunk_size=4)': retention,
  'gla(chunk_size=4)': gla,
  'mamba2(chunk_size=4)': mamba2,
  'lightning(chunk_size=4, depth=0.25)': lightning,
  'deltanet(chunk_size=4)': deltanet,
  'gated_deltanet(chunk_size=4)': gated_deltanet,
  'kda(chunk_size=4)': kda,
  'based(chunk_size=4, feature_dim=2)': based,
  'window_linear(chunk_size=4, window=3)': window_linear,
  "linear(chunk_size=4, feature_map='hedgehog')": hedgehog,
}


@pytest.mark.parametrize(
  ('dtype', 'implementation', 'packed'),
  [
    ('float64', 'reference', False),
    ('float64', None, True),
    ('float32', None, False),
  ],
  ids=['f64-reference', 'f64-packed', 'f32'],
)
@pytest.mark.parametrize('layer', EQUATIONS)
def test_layer_equals_its_equation(layer, dtype, implementation, packed):
  x = make_inputs()
  lengths = LENGTHS if packed else (T,)
  with jax.enable_x64(dtype == 'float64'):
    made = make_layer(layer, dtype=dtype, implementation=implementation)
    ids = jnp.repeat(jnp.arange(len(lengths)), jnp.array(lengths))[None]
    segments = {'segment_ids': ids} if packed else {}
    out = np.asarray(made(jnp.asarray(x, dtype), **segments))
    p = parameters(made)
  assert out.dtype == dtype
  documents = np.split(x[0], np.cumsum(lengths)[:-1])
  expected = np.concatenate([EQUATIONS[layer](p, y) for y in documents])
  expected = expected.reshape(T, -1) @ p['out.kernel']
  size = np.abs(expected).max()
  np.testing.assert_allclose(out[0] / size, expected / size, **tolerance(dtype))


def test_retention_with_rope_rotates_queries_and_keys_by_distance():
  # One head, no convolution: q_t S_t is a sum of γ^(t-s) q_t R^(t-s) k_s v_s.
  made = make_layer(
    'retention',
    dtype='float32',
    num_heads=1,
    num_kv_heads=1,
    position_encoding='rope',
    short_conv=0,
  )
  p, x = parameters(made), make_inputs()
  q, k, v = (x[0] @ p[f'{name}.kernel'] for name in ('query', 'key', 'value'))
  complex_q, complex_k = (y[:, :2] + 1j * y[:, 2:] for y in (q, k))
  out = np.zeros((T, V))
  for t in range(T):
    for s in range(t + 1):
      turn = np.exp(1j * (t - s) * np.array([1, 10_000**-0.5]))
      score = (complex_q[t] * turn * complex_k[s].conj()).real.sum()
      out[t] += (1 - 2**-5) ** (t - s) * score * v[s] / math.sqrt(H)
  out = rms(centred(out)) * silu(x[0] @ p['gate.kernel'])
  np.testing.assert_allclose(
    made(jnp.asarray(x, 'float32'))[0],
    out @ p['out.kernel'],
    **tolerance('float32'),
  )


@pytest.mark.parametrize('norm', [rms_norm, layer_norm, l2_normalize])
def test_norms_and_their_gradients_are_finite_and_bounded(norm):
  x = jnp.asarray([[1e25, -1e25, 3e24], [1e-30, 0, 0], [0, 0, 0], [2, 2, 2]])
  if norm is l2_normalize:
    # Of activations, not of what a state gives.
    x = x.at[0].set(jnp.array([1e8, -1e8, 3e7]))
  y, vjp = jax.vjp(norm, x)
  assert np.abs(y).max() < 2
  np.testing.assert_array_equal(y[2], 0)
  assert np.isfinite(vjp(jnp.ones_like(y))[0]).all()


def test_rms_norm_has_the_gradient_of_its_formula(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)) * 3)
  direct = lambda x: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  for size in (1.0, 1e-3):
    actual, expected = (jax.jacobian(f)(size * x) for f in (rms_norm, direct))
    np.testing.assert_allclose(actual, expected, **tolerance('float64'))


def test_decays_start_where_the_papers_have_them():
  dt = jax.nn.softplus(initial_dt_bias(jax.random.key(0), 2000, 'float32'))
  assert 0.001 <= dt.min() < 0.0011
  assert 0.09 < dt.max() <= 0.1001
  # Uniform in its logarithm: the median is the geometric mean of the ends.
  assert 0.009 < np.median(dt) < 0.011
  rates = np.exp(initial_log_rates(jax.random.key(0), 2000, 'float32', low=1.0))
  assert 1 <= rates.min() < 1.1
  assert 15.9 < rates.max() <= 16.001
  assert np.isfinite(
    initial_log_rates(jax.random.key(0), 10**5, 'float32', low=0.0)
  ).all()


REDRAWN = (
  "linear(feature_map='favor+', "
  "feature_arguments={'num_features': 8, 'redraw_every': 2})"
)


def test_training_and_evaluation_use_the_draw_of_their_step():
  config = tiny_config(model={'layers': (REDRAWN,)})
  task = tasks.make_task(**config.task)
  model = runs.resolve_model(config.model, task)
  graph, _ = steps.abstract_params(model)
  params = steps.init_state(model, config)['params']
  functions = steps.make_steps(graph, config)
  batches = runs.open_batches(config, task, 'train')
  batch = next(batches)
  batches.close()
  losses = [
    float(functions.evaluate(params, batch, step)['loss'])
    for step in np.arange(1, 7, dtype=np.int32)
  ]
  assert losses[0] == losses[1] != losses[2] == losses[3] != losses[4]
  assert losses[4] == losses[5] != losses[0]
  for step in (1, 3):
    state = {'params': params, 'opt': steps.init_state(model, config)['opt']}
    # The state is donated, the parameters are not to be.
    state = jax.tree.map(jnp.copy, state)
    _, values = functions.train(state, batch, np.int32(step))
    np.testing.assert_allclose(values['loss'], losses[step - 1], rtol=1e-5)


def test_cosformer_refuses_more_tokens_than_it_tells_apart():
  layer = (
    "linear(feature_map='cosformer', feature_arguments={'max_length': 12})"
  )
  config = TransformerConfig(
    vocab_size=5,
    layers=(layer,),
    d_model=8,
    num_heads=2,
    position_encoding='none',
  )
  validate(config, seq_len=12)
  with pytest.raises(ValueError, match='13 tokens need max_length >= 13'):
    validate(config, seq_len=13)


@pytest.mark.parametrize(
  ('layer', 'message'),
  [
    ('gla(temperature=0.0)', 'temperature=0.0 must be above 0'),
    ('lightning(depth=1.5)', r'depth=1.5 must be in \[0, 1\]'),
    ('window_linear(window=0)', 'window=0 must be at least 1'),
    ('based(feature_dim=0)', 'feature_dim=0 must be at least 1'),
    ('retention(chunk_size=0)', 'chunk_size=0 must be at least 1'),
  ],
)
def test_wrong_arguments_say_what_to_change(layer, message):
  with pytest.raises(ValueError, match=message):
    make_layer(layer, dtype='float32')


@pytest.mark.parametrize('delta', [False, True])
def test_delta_rule_alone_takes_beta(delta):
  recurrence = Recurrence(heads=1, key_dim=2, value_dim=2, delta=delta)
  x = jnp.zeros((1, 3, 1, 2))
  with pytest.raises(ValueError, match='the delta rule alone takes beta'):
    recurrence.run(recurrences, x, x, x, None if delta else x[..., 0])


def test_states_are_as_large_as_the_docstrings_say():
  sizes = {
    'retention': N * H * V,
    'kda': N * H * V,
    'based(feature_dim=2)': N * (1 + 2 + 4) * (V + 1),
    # The state, and five keys and values of each key head.
    'window_linear(window=5)': N * H * (V + 1) + 5 * K * (H + V),
  }
  for layer, size in sizes.items():
    made = make_layer(layer, dtype='float32', short_conv=0)
    assert made.state_bytes(100, 'float32') == 4 * size, layer
