"""Short convolution: causal, within documents, and resumable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.short_conv import short_conv
from tests.tolerances import tolerance

run = jax.jit(short_conv)


def make_inputs(B, T, D, W, dtype='float32'):
  rng = np.random.default_rng(T)
  shapes = dict(x=(B, T, D), kernel=(W, D), initial_state=(B, W - 1, D))
  return {
    name: jnp.asarray(rng.normal(size=shape), dtype)
    for name, shape in shapes.items()
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('T', 'W'), [(9, 4), (2, 4), (1, 3), (5, 1)])
def test_output_equals_numpy_convolution(T, W, dtype):
  inputs = make_inputs(2, T, 3, W, dtype)
  out, state = run(**inputs)
  assert out.dtype == state.dtype == dtype
  x, kernel, before = (np.asarray(y, 'float64') for y in inputs.values())
  padded = np.concatenate([before, x], axis=1)
  for b in range(2):
    for d in range(3):
      expected = np.convolve(padded[b, :, d], kernel[::-1, d], mode='valid')
      np.testing.assert_allclose(
        np.asarray(out[b, :, d], 'float64'), expected, **tolerance(dtype)
      )
  np.testing.assert_array_equal(np.asarray(state, 'float64'), padded[:, T:])


def test_packed_documents_equal_separate_documents():
  inputs = make_inputs(1, 12, 3, 4)
  # Shorter than the kernel, and with an id that comes back.
  lengths, ids = [5, 2, 1, 4], [1, 3, 4, 1]
  segment_ids = jnp.asarray(np.repeat(ids, lengths)[None], jnp.int32)
  out, state = run(**inputs, segment_ids=segment_ids)
  begin = 0
  for length in lengths:
    document = dict(
      x=inputs['x'][:, begin : begin + length], kernel=inputs['kernel']
    )
    if begin == 0:
      document['initial_state'] = inputs['initial_state']
    alone, last_state = short_conv(**document)
    np.testing.assert_allclose(
      out[:, begin : begin + length], alone, **tolerance('float32')
    )
    begin += length
  np.testing.assert_array_equal(state, last_state)


@pytest.mark.parametrize('cut', [1, 7])
def test_two_halves_equal_the_whole(cut):
  inputs = make_inputs(2, 12, 3, 4)
  # A boundary at 6, so that a cut at 7 leaves a state of one own step.
  segment_ids = jnp.asarray([[0] * 6 + [1] * 6, [0] * 12])
  whole, last_state = run(**inputs, segment_ids=segment_ids)
  x, kernel, state = inputs.values()
  first, state = run(
    x[:, :cut],
    kernel,
    segment_ids=segment_ids[:, :cut],
    initial_state=state,
  )
  second, state = run(
    x[:, cut:],
    kernel,
    segment_ids=segment_ids[:, cut:],
    initial_state=state,
  )
  halves = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(halves, whole, **tolerance('float32'))
  np.testing.assert_array_equal(state, last_state)


def test_gradient_reaches_the_window_of_the_own_document_only():
  inputs = make_inputs(1, 10, 2, 4)
  segment_ids = jnp.asarray([[0] * 5 + [1] * 5])

  def out(x):
    return short_conv(x, inputs['kernel'], segment_ids=segment_ids)[0]

  jacobian = jax.jit(jax.jacrev(out))(inputs['x'])
  for t, seen in [(3, [0, 1, 2, 3]), (6, [5, 6]), (9, [6, 7, 8, 9])]:
    gradient = np.abs(jacobian[0, t]).sum(axis=(0, 1, 3))
    reached = np.flatnonzero(gradient)
    np.testing.assert_array_equal(reached, seen)


def test_empty_kernel_is_an_error():
  with pytest.raises(ValueError, match=r'must be \(W, 3\) with W >= 1'):
    short_conv(jnp.zeros((1, 5, 3)), jnp.zeros((0, 3)))
