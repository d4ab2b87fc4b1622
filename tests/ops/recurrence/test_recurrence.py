"""Linear recurrences: chunks equal single steps, which equal the formula."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.recurrence import (
  IMPLEMENTATIONS,
  linear_attention,
  linear_recurrence,
)
from longctx.ops.target import Target, compiling_for
from tests.ops.recurrence import cases
from tests.ops.recurrence.cases import OPS, as_dtype, assert_trees_close
from tests.tolerances import case_id, tolerance

CHUNKED = [name for name in IMPLEMENTATIONS if name != 'reference']
rules = pytest.mark.parametrize('rule', OPS)
implementations = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
chunked_implementations = pytest.mark.parametrize('implementation', CHUNKED)

STATIC = ('scale', 'normalize', 'chunk_size', 'implementation')


@functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
def run(rule, *arrays, **kwargs):
  return OPS[rule](*arrays, **kwargs)


@functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
def value_and_gradients(rule, inputs, *, segment_ids=None, **kwargs):
  """(out, state) and the gradients of a fixed random sum of both."""
  return cases.value_and_gradients(
    lambda x: OPS[rule](**x, segment_ids=segment_ids, scale=0.7, **kwargs),
    inputs,
  )


def case(
  rule,
  T,
  dtype='float32',
  *,
  implementation='xla',
  chunk_size=16,
  segments=False,
  **kwargs,
):
  dims = {letter: kwargs[letter] for letter in 'NK' if letter in kwargs}
  name = [rule, case_id(T=T, C=chunk_size, dtype=dtype, **dims)]
  name += [kwargs[x] for x in ('decay', 'keys') if x in kwargs]
  if 'beta' in kwargs:
    name.append(f'beta{kwargs["beta"]}')
  name += ['packed'] * segments + ['norm'] * ('normalize' in kwargs)
  return pytest.param(
    rule,
    T,
    dtype,
    implementation,
    chunk_size,
    segments,
    kwargs,
    id='-'.join([*name, implementation]),
  )


kernel_case = functools.partial(case, implementation='pallas')


@pytest.mark.parametrize(
  (
    'rule',
    'T',
    'dtype',
    'implementation',
    'chunk_size',
    'segments',
    'kwargs',
  ),
  [
    case('linear', 1, decay='channel'),
    case('linear', 5, decay='head', segments=True),
    case('linear', 48, N=4, K=2),
    case('linear', 37, N=4, K=1, decay='head', segments=True),
    case('linear', 37, N=4, K=2, decay='channel', segments=True),
    case('linear', 37, 'float64', decay='channel'),
    case('linear', 37, 'bfloat16', decay='head', segments=True),
    case('linear', 37, K=1, decay='channel', segments=True, normalize=True),
    # One chunk that is mostly padding, and several of 128.
    kernel_case('linear', 1, decay='channel'),
    kernel_case('linear', 260, B=1, K=1, decay='channel', segments=True),
    kernel_case('linear', 150, 'bfloat16', decay='head', segments=True),
    # More query heads share a key head than a step of the grid takes.
    kernel_case('linear', 37, N=8, K=1, segments=True),
    kernel_case('linear', 150, N=4, K=2, decay='head', normalize=True),
    case('delta', 1, decay='channel'),
    case('delta', 5, decay='head', segments=True, chunk_size=1),
    case('delta', 37, N=4, K=1, decay='head', segments=True),
    case('delta', 37, N=4, K=2, decay='channel', segments=True, chunk_size=12),
    case('delta', 70, decay='head', chunk_size=32),
    case('delta', 70, decay='channel', chunk_size=64),
    case('delta', 37, 'float64', decay='channel'),
    case('delta', 37, 'bfloat16', decay='head', segments=True),
    case('delta', 37, N=4, K=2, beta=0.0),
    case('delta', 37, N=4, K=2, beta=1.0),
    case('delta', 37, N=4, K=2, beta=2.0),
    case('delta', 37, N=4, K=2, beta=1.0, keys='parallel'),
    case('delta', 37, N=4, K=2, beta=2.0, keys='parallel'),
    kernel_case('delta', 1, decay='channel'),
    kernel_case(
      'delta', 70, K=1, decay='channel', segments=True, chunk_size=32
    ),
    kernel_case('delta', 150, decay='head', chunk_size=128),
    kernel_case('delta', 37, 'bfloat16', decay='head', segments=True),
    kernel_case('delta', 37, N=8, K=1, beta=1.0),
    kernel_case('delta', 37, beta=2.0, keys='parallel'),
  ],
)
def test_implementation_equals_recurrence(
  rule, T, dtype, implementation, chunk_size, segments, kwargs
):
  with jax.enable_x64(True):
    inputs = as_dtype(cases.make_inputs(rule, T, **kwargs), dtype)
    B = inputs['q'].shape[0]
    settings = dict(
      segment_ids=cases.make_segments(B, T) if segments else None,
      chunk_size=chunk_size,
    )
    if 'normalize' in kwargs:
      settings['normalize'] = True
    result = value_and_gradients(
      rule, inputs, implementation=implementation, **settings
    )
    expected = value_and_gradients(
      rule, as_dtype(inputs, 'float64'), implementation='reference', **settings
    )
  (out, state), _ = result
  assert out.dtype == dtype
  assert state.dtype == ('float64' if dtype == 'float64' else 'float32')
  assert_trees_close(result, expected, **tolerance(dtype))


def double_sum(k, v, log_decay, initial_state):
  """Σ_j of what is written at j and of what follows it, for every i."""
  for i in range(len(k)):
    total = np.exp(log_decay[: i + 1].sum(0))[:, None]
    memory = total * initial_state
    for j in range(i + 1):
      total = np.exp(log_decay[j + 1 : i + 1].sum(0))
      memory = memory + np.outer(total * k[j], v[j])
    yield memory


def matrix_products(k, v, log_decay, memory, beta):
  for t in range(len(k)):
    erase = np.eye(4) - beta[t] * np.outer(k[t], k[t])
    memory = erase @ np.diag(np.exp(log_decay[t])) @ memory
    memory = memory + beta[t] * np.outer(k[t], v[t])
    yield memory


@pytest.mark.parametrize('decay', [None, 'head', 'channel'])
@rules
def test_reference_equals_the_formula(rule, decay, x64):
  inputs = cases.make_inputs(rule, 9, B=1, N=2, K=1, decay=decay)
  out, state = run(
    rule, **as_dtype(inputs, 'float64'), scale=0.5, implementation='reference'
  )
  q, k, v, initial_state = (
    inputs[name][0] for name in ('q', 'k', 'v', 'initial_state')
  )
  log_decay = np.zeros_like(q)
  if decay is not None:
    log_decay += inputs['log_decay'][0].reshape(9, 2, -1)
  for n in range(2):
    arrays = k[:, 0], v[:, 0], log_decay[:, n], initial_state[n]
    if rule == 'linear':
      memories = list(double_sum(*arrays))
    else:
      memories = list(matrix_products(*arrays, inputs['beta'][0, :, n]))
    expected = 0.5 * np.einsum('TP,TPV->TV', q[:, n], memories)
    np.testing.assert_allclose(out[0, :, n], expected, **tolerance('float64'))
    np.testing.assert_allclose(
      state[0, n], memories[-1], **tolerance('float64')
    )


@chunked_implementations
@pytest.mark.parametrize('decay', ['head', 'channel'])
@rules
def test_chunks_are_exact_for_extreme_decay(rule, decay, implementation):
  patterns = [
    [-8.0],
    [-8.0] * 40 + [-1e-3] * 24,
    [-1e-3] * 40 + [-8.0] * 24,
    [-0.01, -np.inf, -0.1, -1e5, -1e-4],
    [-100.0, 0.0, 0.0],
    # From a decay of one down to e^-8 per step.
    [0.0],
    -8 * np.linspace(0, 1, 17),
    -8 * np.linspace(1, 0, 128),
    [0.01],
  ]
  log_decay = np.stack([np.resize(pattern, 128) for pattern in patterns])
  with jax.enable_x64(True):
    inputs = cases.make_inputs(rule, 128, decay=decay, B=len(patterns))
    inputs['log_decay'] = np.broadcast_to(
      log_decay.reshape(-1, 128, *[1] * (inputs['log_decay'].ndim - 2)),
      inputs['log_decay'].shape,
    )
    inputs = as_dtype(inputs, 'float32')
    result = value_and_gradients(
      rule, inputs, implementation=implementation, chunk_size=64
    )
    expected = value_and_gradients(
      rule, as_dtype(inputs, 'float64'), implementation='reference'
    )
  for row in range(len(patterns)):
    assert_trees_close(
      *jax.tree.map(lambda x, row=row: x[row], (result, expected)),
      **tolerance('float32'),
    )


@implementations
@rules
def test_packed_documents_equal_separate_documents(rule, implementation):
  # Documents of 8 steps, so that one compilation serves all when alone; the id
  # of the first comes back, as a new document all the same.
  inputs = cases.make_inputs(rule, 32, B=1, decay='channel')
  inputs = as_dtype(inputs, 'float32')
  initial_state = inputs.pop('initial_state')
  segment_ids = jnp.repeat(jnp.array([[1, 5, 1, 2]], jnp.int32), 8, axis=1)
  settings = dict(implementation=implementation, chunk_size=12)
  out, state = run(
    rule,
    **inputs,
    segment_ids=segment_ids,
    initial_state=initial_state,
    **settings,
  )
  for begin in range(0, 32, 8):
    document = {name: x[:, begin : begin + 8] for name, x in inputs.items()}
    alone, last_state = run(
      rule,
      **document,
      initial_state=initial_state if begin == 0 else 0 * initial_state,
      **settings,
    )
    np.testing.assert_allclose(
      out[:, begin : begin + 8], alone, **tolerance('float32')
    )
  np.testing.assert_allclose(state, last_state, **tolerance('float32'))


@chunked_implementations
@pytest.mark.parametrize('decay', ['head', 'channel'])
@rules
def test_no_gradient_from_the_future_or_another_document(
  rule, decay, implementation
):
  inputs = as_dtype(cases.make_inputs(rule, 24, B=1, decay=decay), 'float32')
  segment_ids = jnp.asarray([[0] * 3 + [1] * 8 + [2] * 13], jnp.int32)

  @jax.jit
  @jax.grad
  def gradients_of_step_17(inputs):
    out, _ = OPS[rule](
      **inputs,
      segment_ids=segment_ids,
      chunk_size=16,
      implementation=implementation,
    )
    return out[:, 17].sum()

  gradients = jax.tree.map(np.asarray, gradients_of_step_17(inputs))
  assert np.abs(gradients.pop('initial_state')).max() == 0
  first = dict(q=17, k=11, v=11, beta=11, log_decay=12)
  for name, gradient in gradients.items():
    seen = np.flatnonzero(np.abs(gradient).reshape(24, -1).sum(1))
    np.testing.assert_array_equal(seen, np.arange(first[name], 18), name)


@implementations
@pytest.mark.parametrize(
  ('rule', 'options'),
  [('linear', {}), ('linear', {'normalize': True}), ('delta', {})],
)
def test_two_halves_equal_the_whole(rule, options, implementation):
  inputs = cases.make_inputs(rule, 32, decay='head', N=4, K=2, **options)
  inputs = as_dtype(inputs, 'float32')
  del inputs['initial_state']
  # The cut at 16 is inside the second document.
  inputs['segment_ids'] = jnp.asarray([[0] * 9 + [1] * 20 + [2] * 3] * 2)
  settings = dict(implementation=implementation, chunk_size=8, **options)
  begin, end = (
    {name: x[:, part] for name, x in inputs.items()}
    for part in (slice(16), slice(16, None))
  )
  whole, last_state = run(rule, **inputs, **settings)
  first, state = run(rule, **begin, **settings)
  second, state = run(rule, **end, initial_state=state, **settings)
  halves = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(halves, whole, **tolerance('float32'))
  np.testing.assert_allclose(state, last_state, **tolerance('float32'))


@implementations
def test_normalized_output_is_a_weighted_mean(implementation):
  inputs = cases.make_inputs('linear', 20, normalize=True)
  q, k, v = (inputs[name] for name in 'qkv')
  out, state = run(
    'linear',
    *(jnp.asarray(x, 'float32') for x in (q, k, v)),
    normalize=True,
    implementation=implementation,
    chunk_size=8,
  )
  weights = np.tril(np.einsum('BTNP,BSNP->BNTS', q, k))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum('BNTS,BSNV->BTNV', weights, v)
  np.testing.assert_allclose(out, expected, **tolerance('float32'))
  np.testing.assert_allclose(state[..., -1], k.sum(1), **tolerance('float32'))


def test_normalizer_of_zero_gives_zero_and_finite_gradients():
  inputs = {name: np.zeros((1, 4, 1, 2), np.float32) for name in 'qkv'}
  (out, _), gradients = value_and_gradients('linear', inputs, normalize=True)
  np.testing.assert_array_equal(out, 0)
  assert all(np.isfinite(x).all() for x in gradients.values())


@implementations
def test_beta_of_one_recalls_the_last_value_of_every_key(implementation):
  # Two rounds over the same orthogonal keys: what the first wrote is gone.
  rng = np.random.default_rng(0)
  k, _ = np.linalg.qr(rng.normal(size=(4, 4)))
  k = jnp.asarray(np.tile(k, (2, 1))[None, :, None], jnp.float32)
  v = jnp.asarray(rng.normal(size=(1, 8, 1, 3)), jnp.float32)
  _, state = run(
    'delta',
    k,
    k,
    v,
    jnp.ones((1, 8, 1)),
    implementation=implementation,
    chunk_size=4,
  )
  recalled = jnp.einsum('BTNP,BNPV->BTNV', k[:, 4:], state)
  np.testing.assert_allclose(recalled, v[:, 4:], **tolerance('float32'))


@implementations
def test_beta_of_zero_writes_nothing(implementation):
  inputs = as_dtype(cases.make_inputs('delta', 9, beta=0.0), 'float32')
  _, state = run('delta', **inputs, implementation=implementation, chunk_size=4)
  np.testing.assert_array_equal(state, inputs['initial_state'])


@implementations
def test_orthogonal_keys_make_it_linear_attention(implementation):
  inputs = cases.make_inputs('delta', 4, K=1, beta=1.0, decay='head')
  inputs = as_dtype(inputs, 'float32')
  del inputs['initial_state']
  inputs['k'] = jnp.tile(jnp.eye(4)[None, :, None], (2, 1, 1, 1))
  beta = inputs.pop('beta')
  assert_trees_close(
    run('delta', **inputs, beta=beta, implementation=implementation),
    linear_attention(**inputs),
    **tolerance('float32'),
  )


@pytest.mark.parametrize('chunk_size', [1, 7, 64])
def test_chunks_call_no_library(chunk_size):
  # Two LAPACK calls at a time can wait for each other's threads for ever.
  inputs = cases.make_inputs('delta', 70, decay='head')

  def loss(inputs):
    out, _ = run('delta', **inputs, chunk_size=chunk_size, implementation='xla')
    return out.sum()

  compiled = jax.jit(jax.grad(loss)).lower(inputs).compile()
  assert 'lapack' not in compiled.as_text()


def test_jit_changes_nothing():
  inputs = as_dtype(cases.make_inputs('delta', 9, decay='head'), 'float32')
  settings = dict(scale=0.5, chunk_size=4)
  assert_trees_close(
    run('delta', **inputs, **settings),
    OPS['delta'](**inputs, **settings),
    **tolerance('float32'),
  )


@pytest.mark.parametrize(
  ('rule', 'mode', 'implementation', 'dtype'),
  [
    ('linear', 'forward', 'xla', 'float64'),
    ('linear', 'reverse', 'xla', 'float64'),
    ('linear', 'reverse', 'pallas', 'float32'),
    ('delta', 'forward', 'xla', 'float64'),
    ('delta', 'reverse', 'xla', 'float64'),
    ('delta', 'forward', 'pallas', 'float32'),
  ],
)
def test_second_derivative_equals_that_of_the_recurrence(
  rule, mode, implementation, dtype, x64
):
  inputs = as_dtype(cases.make_inputs(rule, 7, B=1, decay='head'), 'float64')
  segment_ids = cases.make_segments(1, 7)

  @functools.partial(jax.jit, static_argnums=1)
  def second(inputs, implementation):
    def loss(inputs):
      out, state = OPS[rule](
        **inputs,
        segment_ids=segment_ids,
        implementation=implementation,
        chunk_size=4,
      )
      return (out**2).sum() + (state**2).sum()

    direction = jax.tree.map(jnp.cos, inputs)
    if mode == 'forward':
      return jax.jvp(jax.grad(loss), (inputs,), (direction,))[1]
    _, vjp = jax.vjp(jax.grad(loss), inputs)
    return vjp(direction)[0]

  assert_trees_close(
    second(as_dtype(inputs, dtype), implementation),
    second(inputs, 'reference'),
    **tolerance(dtype),
  )


def call_of(rule, width=4, dtype='float32'):
  x = jnp.zeros((1, 5, 2, width), dtype)
  arrays = (x, x, x, x[..., 0])[: 4 if rule == 'delta' else 3]
  return functools.partial(OPS[rule], *arrays)


@pytest.mark.parametrize(
  ('platform', 'dtype', 'width', 'message'),
  [
    ('cpu', 'float64', 4, "q is float64, .* take 'xla' or None"),
    ('gpu', 'float32', 4, "a GPU: take 'xla' or None"),
    ('tpu', 'float32', 513, 'P=513 and V=513 must be at most 512'),
  ],
)
@rules
def test_kernel_says_what_it_does_not_support(
  rule, platform, dtype, width, message, x64
):
  run = call_of(rule, width, dtype)
  with compiling_for(Target(platform, 'TPU v5')):
    with pytest.raises(NotImplementedError, match=message):
      run(implementation='pallas')
    assert 'pallas' not in str(jax.make_jaxpr(run)())


@rules
def test_kernel_is_what_tpus_take(rule):
  run = call_of(rule)
  assert 'pallas' not in str(jax.make_jaxpr(run)())
  with compiling_for(Target('tpu', 'TPU v5')):
    assert 'pallas' in str(jax.make_jaxpr(lambda: run())())


NO_STEPS = dict(q=(1, 0, 4, 4), k=(1, 0, 2, 4), v=(1, 0, 2, 4))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(implementation='triton'), r"known: \['pallas', 'reference', 'xla'\]"),
    (dict(chunk_size=0), 'chunk_size=0 must be at least 1'),
    (dict(k=(1, 5, 3, 4), v=(1, 5, 3, 4)), 'N=4 query heads .* K=3 key heads'),
    (NO_STEPS, 'has no steps'),
    (NO_STEPS | dict(beta=(1, 0, 4)), 'has no steps'),
    (dict(log_decay=(1, 5, 4, 1)), r'log_decay.shape=\(1, 5, 4, 1\) must be'),
    (dict(beta=(1, 5, 2)), r'beta.shape=\(1, 5, 2\) must be \(1, 5, 4\)'),
    (dict(initial_state=(1, 4, 4, 5)), r'must be \(1, 4, 4, 4\)'),
    (dict(initial_state=(1, 4, 4, 4), normalize=True), r'\(1, 4, 4, 5\) with'),
    (dict(beta=(1, 5, 4), normalize=True), 'no sum of keys to normalize by'),
  ],
)
def test_wrong_call_says_what_to_change(change, message):
  call = dict(q=(1, 5, 4, 4), k=(1, 5, 2, 4), v=(1, 5, 2, 4)) | change
  call = {
    name: jnp.zeros(x) if isinstance(x, tuple) else x
    for name, x in call.items()
  }
  # A user has no type checker, whose error would come first here.
  unchecked = inspect.unwrap(linear_recurrence)
  with pytest.raises(ValueError, match=message):
    unchecked(**call)
