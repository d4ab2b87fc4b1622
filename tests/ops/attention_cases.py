"""Inputs and options of attention, shared by the tests of implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longctx import masks
from longctx.ops.dot_product_attention import dot_product_attention
from tests.tolerances import tolerance


def make_inputs(
  B=2, T=37, S=None, N=4, K=2, H=8, V=12, dtype='float32', seed=0
):
  """q, k, v, sink_logits and the cotangents of out and lse."""
  rng = np.random.default_rng(seed)
  S = S or T
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, V), (N,), (B, T, N, V)]
  arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
  wide = jnp.promote_types(dtype, jnp.float32)
  return *arrays, jnp.asarray(rng.normal(size=(B, T, N)), wide)


def documents(B, T, *, seed=1):
  """Segment ids of packed documents, cut elsewhere in each batch row."""
  rng = np.random.default_rng(seed)
  return np.sort(rng.integers(0, 3, (B, T)), axis=1)


def shuffled(B, T, *, seed=2):
  """Positions in another order in each batch row."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.permutation(T) for _ in range(B)])


def run(implementation, inputs, *, sink=False, rate=0.0, **options):
  """out, lse and the gradients of q, k, v and sink_logits from both."""
  static = {
    name: value
    for name, value in options.items()
    if not isinstance(value, jax.Array | np.ndarray)
  }
  arrays = {n: jnp.asarray(v) for n, v in options.items() if n not in static}
  static |= dict(implementation=implementation)
  return _run(inputs, arrays, tuple(static.items()), sink, rate)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(inputs, arrays, static, sink, rate):
  *primals, out_bar, lse_bar = inputs

  def attend(q, k, v, sink_logits):
    extra = dict(sink_logits=sink_logits) if sink else {}
    if rate:
      extra['dropout'] = (rate, jax.random.key(3))
    return dot_product_attention(
      q, k, v, return_lse=True, **extra, **arrays, **dict(static)
    )

  outputs, vjp = jax.vjp(attend, *primals)
  return *outputs, *vjp((out_bar, lse_bar))


def check(actual, expected, dtype='float32'):
  names = ('out', 'lse', 'dq', 'dk', 'dv', 'dsink')
  for name, x, y in zip(names, actual, expected, strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape, name
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    # Gradients sum over as many terms as there are queries and heads.
    size = max(1, np.abs(y[np.isfinite(y)]).max(initial=0))
    y, x = (
      np.where(np.isfinite(y), y / size, y),
      np.where(np.isfinite(x), x / size, x),
    )
    np.testing.assert_allclose(x, y, **tolerance(dtype), err_msg=name)


def cases(T):
  """Options by name, for B = 2 rows of T tokens and N = 4 heads."""
  slopes = np.float32([1, 0.5, 0.25, 0.125])
  return {
    'full': dict(mask=masks.Full()),
    'window': dict(mask=masks.SlidingWindow(7)),
    'two-sided': dict(mask=masks.SlidingWindow(9, 3), logits_soft_cap=2.0),
    'dilated': dict(mask=masks.Causal() & masks.Dilated(4, 3)),
    'longformer': dict(mask=masks.SlidingWindow(4, 4) | masks.GlobalTokens(3)),
    'sinks': dict(
      mask=masks.Causal() & masks.PrefixColumns(2) | masks.SlidingWindow(5)
    ),
    'bigbird': dict(mask=masks.RandomBlocks(8, 1, 0) | masks.SlidingWindow(4)),
    'pattern': dict(
      mask=masks.BlockSparse(8, ((1, 0, 1), (0, 1, 0), (0, 0, 0)))
    ),
    'packed': dict(q_segment_ids=documents(2, T)),
    'packed-window': dict(
      q_segment_ids=documents(2, T), mask=masks.SlidingWindow(7), sink=True
    ),
    'shuffled': dict(q_positions=shuffled(2, T), k_positions=shuffled(2, T)),
    'shuffled-window': dict(
      q_positions=shuffled(1, T)[0],
      k_positions=shuffled(1, T)[0],
      mask=masks.SlidingWindow(5) | masks.Causal() & masks.PrefixColumns(2),
    ),
    'alibi': dict(alibi_slopes=slopes, scale=0.5),
    'softmax1': dict(normalizer='softmax1', sink=True),
    'softpick': dict(normalizer='softpick'),
    'softpick-packed': dict(
      normalizer='softpick',
      q_segment_ids=documents(2, T),
      mask=masks.SlidingWindow(7),
      logits_soft_cap=2.0,
      rate=0.3,
    ),
    'sigmoid': dict(normalizer='sigmoid'),
    'sigmoid-packed': dict(
      normalizer='sigmoid',
      q_segment_ids=documents(2, T),
      alibi_slopes=slopes,
      rate=0.3,
    ),
    'dropout': dict(rate=0.3, q_segment_ids=documents(2, T)),
    'everything': dict(
      mask=masks.SlidingWindow(9, 3),
      q_segment_ids=documents(2, T),
      q_positions=shuffled(2, T),
      alibi_slopes=slopes,
      logits_soft_cap=2.0,
      sink=True,
      rate=0.2,
    ),
  }
