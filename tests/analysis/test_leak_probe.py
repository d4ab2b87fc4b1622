"""The probes on computations whose reading is known by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.analysis import leak_probe
from longctx.masks import Causal, PrefixColumns, SlidingWindow

B, T, D = 2, 13, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
SEGMENTS = np.array([0] * 5 + [1] * 1 + [2] * 7)


def mixer(allowed):
  """Softmax attention of x with itself on the allowed pairs."""

  def fn(x):
    logits = jnp.einsum('BTD,BSD->BTS', x, x) / 10
    logits = jnp.where(allowed, logits, -jnp.inf)
    return jnp.einsum('BTS,BSD->BTD', jax.nn.softmax(logits), x)

  return fn


MASKS = {
  'causal': Causal(),
  'window': SlidingWindow(3),
  'sinks-window': PrefixColumns(2) & Causal() | SlidingWindow(2),
}


@pytest.mark.parametrize('segment_ids', [None, SEGMENTS], ids=['one', 'packed'])
@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize('probe', [leak_probe.reads, leak_probe.changes])
def test_probes_find_exactly_the_allowed_pairs(probe, mask, segment_ids):
  allowed = leak_probe.allowed_pairs(mask, T, segment_ids)
  found = probe(mixer(allowed), X)
  assert leak_probe.leaks(found, allowed) == []
  assert leak_probe.unread(found, allowed) == []


def test_one_leaking_pair_is_named():
  allowed = Causal().dense(T, T)
  leaky = allowed.copy()
  leaky[4, 9] = True
  read = leak_probe.reads(mixer(leaky), X)
  assert leak_probe.leaks(read, allowed) == [(4, 9)]
  with pytest.raises(AssertionError, match=r'\(4, 9\)'):
    leak_probe.assert_causal(mixer(leaky), X)


def test_gradients_show_a_weight_that_rounding_swallows():
  def fn(x):
    return x + 1e-20 * jnp.roll(x, -1, axis=1)

  pair = (0, 1)
  assert leak_probe.reads(fn, X)[pair]
  assert not leak_probe.changes(fn, X)[pair]


def test_perturbation_shows_what_gradients_cannot():
  def fn(x):
    return x - jax.lax.stop_gradient(x.max(axis=1, keepdims=True))

  # The scale of a stabiliser that looks at the whole sequence.
  assert not leak_probe.leaks(leak_probe.reads(fn, X), np.eye(T, dtype=bool))
  assert leak_probe.leaks(leak_probe.changes(fn, X), np.eye(T, dtype=bool))


def test_reach_is_what_a_stack_reads():
  layers = [
    leak_probe.allowed_pairs(SlidingWindow(width), T) for width in (2, 1, 3)
  ]

  def stack(x):
    for layer in layers:
      x = x + mixer(layer)(x)
    return x

  allowed = leak_probe.reach(layers)
  np.testing.assert_array_equal(allowed, SlidingWindow(6).dense(T, T))
  np.testing.assert_array_equal(leak_probe.reads(stack, X), allowed)


def test_chosen_probes_are_rows_of_the_whole():
  fn = mixer(Causal().dense(T, T))
  np.testing.assert_array_equal(
    leak_probe.reads(fn, X, probes=[7, 2]),
    leak_probe.reads(fn, X, block=5)[[7, 2]],
  )
  np.testing.assert_array_equal(
    leak_probe.changes(fn, X, probes=[7, 2]),
    leak_probe.changes(fn, X)[:, [7, 2]],
  )


def test_an_output_that_ignores_its_own_input_is_not_called_causal():
  with pytest.raises(AssertionError, match='their own input'):
    leak_probe.assert_causal(lambda x: jnp.zeros_like(x) * x, X)


@pytest.mark.parametrize(
  ('fn', 'x', 'options', 'message'),
  [
    (lambda x: x, jnp.zeros((B, T, D), jnp.int32), {}, 'not tokens'),
    (lambda x: x, X, {'probes': [T]}, 'from 0 to 12'),
    (lambda x: x, X, {'probes': []}, 'from 0 to 12'),
    (lambda x: x[:, 0, 0], X, {}, 'must be'),
    (lambda x: x / 0, X, {}, 'not finite'),
  ],
  ids=['tokens', 'outside', 'none', 'shape', 'nan'],
)
def test_bad_probe_is_refused(fn, x, options, message):
  if x.dtype == jnp.int32:
    # Past the type checker of the tests, as a user would call it.
    with pytest.raises(ValueError, match=message):
      leak_probe._check(fn, x)
    return
  with pytest.raises(ValueError, match=message):
    leak_probe.reads(fn, x, **options)
