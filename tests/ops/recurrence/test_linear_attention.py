"""Linear attention: chunks equal single steps, which equal the double sum."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.recurrence.additive import (
  IMPLEMENTATIONS,
  linear_attention,
)
from longctx.ops.target import Target, compiling_for
from tests.tolerances import case_id, tolerance

CHUNKED = [name for name in IMPLEMENTATIONS if name != 'reference']


def make_inputs(T, *, B=2, N=2, K=2, P=4, V=3, decay=None, strength=8.0):
  """Float64 arrays by name; log_decay reaches from 0 down to -strength."""
  rng = np.random.default_rng(T)
  inputs = dict(
    q=rng.normal(size=(B, T, N, P)) / math.sqrt(P),
    k=rng.normal(size=(B, T, K, P)),
    v=rng.normal(size=(B, T, K, V)),
    initial_state=rng.normal(size=(B, N, P, V)),
  )
  if decay is not None:
    shape = (B, T, N, P) if decay == 'channel' else (B, T, N)
    # Cubed: most steps remember, some forget nearly all.
    inputs['log_decay'] = -strength * rng.uniform(size=shape) ** 3
  return inputs


def make_segments(B, T, documents=3):
  rng = np.random.default_rng(T)
  return jnp.asarray(
    np.sort(rng.integers(0, documents, size=(B, T))), jnp.int32
  )


@functools.partial(
  jax.jit, static_argnames=('normalize', 'chunk_size', 'implementation')
)
def value_and_gradients(inputs, *, segment_ids=None, **kwargs):
  """(out, state) and the gradients of a fixed random sum of both."""
  results, vjp = jax.vjp(
    lambda x: linear_attention(
      **x, segment_ids=segment_ids, scale=0.7, **kwargs
    ),
    inputs,
  )
  rng = np.random.default_rng(0)
  seeds = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in results]
  return results, vjp(tuple(seeds))[0]


run = jax.jit(
  linear_attention,
  static_argnames=('scale', 'normalize', 'chunk_size', 'implementation'),
)


def as_dtype(inputs, dtype):
  return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def assert_trees_close(result, expected, **tolerances):
  """Compares leaf by leaf, errors in units of the largest entry."""
  for (path, x), y in zip(
    jax.tree.leaves_with_path(result), jax.tree.leaves(expected), strict=True
  ):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = max(1.0, np.abs(y).max())
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x / size, y / size, err_msg=name, **tolerances)


def case(
  T,
  dtype='float32',
  *,
  implementation='xla',
  segments=False,
  normalize=False,
  **kwargs,
):
  name = case_id(
    T=T,
    dtype=dtype,
    **{letter: kwargs[letter] for letter in 'NK' if letter in kwargs},
  )
  extras = [kwargs.get('decay'), segments and 'packed', normalize and 'norm']
  name = '-'.join([name, *filter(None, extras), implementation])
  return pytest.param(
    T, dtype, segments, normalize, kwargs, implementation, id=name
  )


kernel_case = functools.partial(case, implementation='pallas')


@pytest.mark.parametrize(
  ('T', 'dtype', 'segments', 'normalize', 'kwargs', 'implementation'),
  [
    case(1, decay='channel'),
    case(5, decay='head', segments=True),
    case(48, N=4, K=2),
    case(37, N=4, K=1, decay='head', segments=True),
    case(37, N=4, K=2, decay='channel', segments=True),
    case(37, decay='channel', dtype='float64'),
    case(37, decay='head', segments=True, dtype='bfloat16'),
    case(37, N=2, K=1, decay='channel', segments=True, normalize=True),
    # One chunk that is mostly padding, and several of 128.
    kernel_case(1, decay='channel'),
    kernel_case(260, B=1, N=2, K=1, decay='channel', segments=True),
    kernel_case(150, decay='head', segments=True, dtype='bfloat16'),
    # More query heads share a key head than a step of the grid takes.
    kernel_case(37, N=8, K=1, segments=True),
    kernel_case(150, N=4, K=2, decay='head', normalize=True),
  ],
)
def test_implementation_equals_recurrence(
  T, dtype, segments, normalize, kwargs, implementation
):
  with jax.enable_x64(True):
    inputs = make_inputs(T, **kwargs)
    if normalize:
      inputs['q'], inputs['k'] = np.abs(inputs['q']), np.abs(inputs['k'])
      z = np.ones_like(inputs['initial_state'][..., :1])
      state = [inputs['initial_state'], z]
      inputs['initial_state'] = np.concatenate(state, axis=-1)
    inputs = as_dtype(inputs, dtype)
    kwargs = dict(
      segment_ids=make_segments(inputs['q'].shape[0], T) if segments else None,
      normalize=normalize,
      chunk_size=16,
    )
    result = value_and_gradients(
      inputs, implementation=implementation, **kwargs
    )
    expected = value_and_gradients(
      as_dtype(inputs, 'float64'), implementation='reference', **kwargs
    )
  (out, state), _ = result
  assert out.dtype == dtype
  assert state.dtype == ('float64' if dtype == 'float64' else 'float32')
  assert_trees_close(result, expected, **tolerance(dtype))


@pytest.mark.parametrize('decay', [None, 'head', 'channel'])
def test_reference_equals_double_sum(decay, x64):
  inputs = make_inputs(9, B=1, N=2, K=1, decay=decay)
  q, k, v = (inputs[name][0] for name in 'qkv')
  out, state = run(
    **as_dtype(inputs, 'float64'),
    scale=0.5,
    implementation='reference',
  )
  log_decay = np.zeros_like(q)
  if decay is not None:
    log_decay += inputs['log_decay'][0].reshape(9, 2, -1)
  for n in range(2):
    for i in range(9):
      total = np.exp(log_decay[: i + 1, n].sum(0))[:, None]
      memory = total * inputs['initial_state'][0, n]
      for j in range(i + 1):
        total = np.exp(log_decay[j + 1 : i + 1, n].sum(0))
        memory = memory + np.outer(total * k[j, 0], v[j, 0])
      expected = 0.5 * q[i, n] @ memory
      np.testing.assert_allclose(out[0, i, n], expected, **tolerance('float64'))
    np.testing.assert_allclose(state[0, n], memory, **tolerance('float64'))


@pytest.mark.parametrize('implementation', CHUNKED)
@pytest.mark.parametrize('decay', ['head', 'channel'])
def test_chunks_are_exact_for_extreme_decay(decay, implementation):
  patterns = [
    [-8.0],
    [-8.0] * 40 + [-1e-3] * 24,
    [-1e-3] * 40 + [-8.0] * 24,
    [-0.01, -np.inf, -0.1, -1e5, -1e-4],
    # From a decay of one down to e^-8 per step.
    [0.0],
    -8 * np.linspace(0, 1, 17),
    -8 * np.linspace(1, 0, 128),
    [0.01],
  ]
  log_decay = np.stack([np.resize(pattern, 128) for pattern in patterns])
  with jax.enable_x64(True):
    inputs = make_inputs(128, decay=decay, B=len(patterns))
    inputs['log_decay'] = np.broadcast_to(
      log_decay.reshape(-1, 128, *[1] * (inputs['log_decay'].ndim - 2)),
      inputs['log_decay'].shape,
    )
    inputs = as_dtype(inputs, 'float32')
    result = value_and_gradients(
      inputs, implementation=implementation, chunk_size=64
    )
    expected = value_and_gradients(
      as_dtype(inputs, 'float64'), implementation='reference'
    )
  for row in range(len(patterns)):
    assert_trees_close(
      *jax.tree.map(lambda x, row=row: x[row], (result, expected)),
      **tolerance('float32'),
    )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_packed_documents_equal_separate_documents(implementation):
  # Documents of 8 steps, so that one compilation serves all when alone; the id
  # of the first comes back, as a new document all the same.
  inputs = as_dtype(make_inputs(32, B=1, decay='channel'), 'float32')
  initial_state = inputs.pop('initial_state')
  segment_ids = jnp.repeat(jnp.array([[1, 5, 1, 2]], jnp.int32), 8, axis=1)
  settings = dict(implementation=implementation, chunk_size=12)
  out, state = run(
    **inputs, segment_ids=segment_ids, initial_state=initial_state, **settings
  )
  for begin in range(0, 32, 8):
    document = {name: x[:, begin : begin + 8] for name, x in inputs.items()}
    alone, last_state = run(
      **document,
      initial_state=initial_state if begin == 0 else 0 * initial_state,
      **settings,
    )
    np.testing.assert_allclose(
      out[:, begin : begin + 8], alone, **tolerance('float32')
    )
  np.testing.assert_allclose(state, last_state, **tolerance('float32'))


@pytest.mark.parametrize('implementation', CHUNKED)
@pytest.mark.parametrize('decay', ['head', 'channel'])
def test_no_gradient_from_the_future_or_another_document(decay, implementation):
  inputs = as_dtype(make_inputs(24, B=1, decay=decay), 'float32')
  segment_ids = jnp.asarray([[0] * 3 + [1] * 8 + [2] * 13], jnp.int32)

  @jax.jit
  @jax.grad
  def gradients_of_step_17(inputs):
    out, _ = linear_attention(
      **inputs,
      segment_ids=segment_ids,
      chunk_size=16,
      implementation=implementation,
    )
    return out[:, 17].sum()

  gradients = jax.tree.map(np.asarray, gradients_of_step_17(inputs))
  assert np.abs(gradients.pop('initial_state')).max() == 0
  first = dict(q=17, k=11, v=11, log_decay=12)
  for name, gradient in gradients.items():
    seen = np.flatnonzero(np.abs(gradient).reshape(24, -1).sum(1))
    np.testing.assert_array_equal(seen, np.arange(first[name], 18), name)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('normalize', [False, True])
def test_two_halves_equal_the_whole(normalize, implementation):
  inputs = make_inputs(32, decay='head', N=4, K=2)
  inputs = as_dtype(inputs | {x: np.abs(inputs[x]) for x in 'qk'}, 'float32')
  del inputs['initial_state']
  # The cut at 16 is inside the second document.
  inputs['segment_ids'] = jnp.asarray([[0] * 9 + [1] * 20 + [2] * 3] * 2)
  settings = dict(
    normalize=normalize, implementation=implementation, chunk_size=8
  )
  whole, last_state = run(**inputs, **settings)
  first, state = run(**{x: y[:, :16] for x, y in inputs.items()}, **settings)
  second, state = run(
    **{x: y[:, 16:] for x, y in inputs.items()},
    initial_state=state,
    **settings,
  )
  halves = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(halves, whole, **tolerance('float32'))
  np.testing.assert_allclose(state, last_state, **tolerance('float32'))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_normalized_output_is_a_weighted_mean(implementation):
  inputs = make_inputs(20)
  q, k = np.abs(inputs['q']), np.abs(inputs['k'])
  out, state = run(
    *(jnp.asarray(x, 'float32') for x in (q, k, inputs['v'])),
    normalize=True,
    implementation=implementation,
    chunk_size=8,
  )
  weights = np.tril(np.einsum('BTNP,BSNP->BNTS', q, k))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum('BNTS,BSNV->BTNV', weights, inputs['v'])
  np.testing.assert_allclose(out, expected, **tolerance('float32'))
  np.testing.assert_allclose(state[..., -1], k.sum(1), **tolerance('float32'))


def test_normalizer_of_zero_gives_zero_and_finite_gradients():
  inputs = {name: np.zeros((1, 4, 1, 2), np.float32) for name in 'qkv'}
  (out, _), gradients = value_and_gradients(inputs, normalize=True)
  np.testing.assert_array_equal(out, 0)
  assert all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize(
  ('mode', 'implementation', 'dtype'),
  [
    ('forward', 'xla', 'float64'),
    ('reverse', 'xla', 'float64'),
    ('reverse', 'pallas', 'float32'),
  ],
)
def test_second_derivative_equals_that_of_the_recurrence(
  mode, implementation, dtype, x64
):
  inputs = as_dtype(make_inputs(7, B=1, decay='head'), 'float64')
  segment_ids = make_segments(1, 7)

  @functools.partial(jax.jit, static_argnums=1)
  def second(inputs, implementation):
    def loss(inputs):
      out, state = linear_attention(
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


@pytest.mark.parametrize(
  ('platform', 'dtype', 'width', 'message'),
  [
    ('cpu', 'float64', 4, "q is float64, .* take 'xla' or None"),
    (
      'gpu',
      'float32',
      4,
      "a GPU: take 'xla' or None",
    ),
    ('tpu', 'float32', 513, 'P=513 and V=513 must be at most 512'),
  ],
)
def test_kernel_says_what_it_does_not_support(
  platform, dtype, width, message, x64
):
  x = jnp.zeros((1, 5, 2, width), dtype)
  run = functools.partial(linear_attention, x, x, x)
  with compiling_for(Target(platform, 'TPU v5')):
    with pytest.raises(NotImplementedError, match=message):
      run(implementation='pallas')
    assert 'pallas' not in str(jax.make_jaxpr(run)())


def test_kernel_is_what_tpus_take():
  x = jnp.zeros((1, 5, 2, 4))
  run = functools.partial(linear_attention, x, x, x)
  assert 'pallas' not in str(jax.make_jaxpr(run)())
  with compiling_for(Target('tpu', 'TPU v5')):
    assert 'pallas' in str(jax.make_jaxpr(lambda: run())())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(implementation='triton'), r"known: \['pallas', 'reference', 'xla'\]"),
    (dict(chunk_size=0), 'chunk_size=0 must be at least 1'),
    (dict(k=(1, 5, 3, 4), v=(1, 5, 3, 4)), 'N=4 query heads .* K=3 key heads'),
    (dict(q=(1, 0, 4, 4), k=(1, 0, 2, 4), v=(1, 0, 2, 4)), 'has no steps'),
    (dict(initial_state=(1, 4, 4, 4), normalize=True), r'\(1, 4, 4, 5\) with'),
  ],
)
def test_wrong_call_says_what_to_change(change, message):
  call = dict(q=(1, 5, 4, 4), k=(1, 5, 2, 4), v=(1, 5, 2, 4)) | change
  call = {
    name: jnp.zeros(x) if isinstance(x, tuple) else x
    for name, x in call.items()
  }
  with pytest.raises(ValueError, match=message):
    linear_attention(**call)
