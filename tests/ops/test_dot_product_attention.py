"""The implementations of dot-product attention against the equation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import masks
from longctx.ops.dot_product_attention import (
  IMPLEMENTATIONS,
  NORMALIZERS,
  BlockSizes,
  dot_product_attention,
)
from tests.ops.attention_cases import (
  cases,
  check,
  documents,
  make_inputs,
  run,
)
from tests.tolerances import case_id, tolerance

ANYWHERE = sorted(set(IMPLEMENTATIONS) - {'cudnn'})
OTHERS = sorted(set(ANYWHERE) - {'reference'})
# Kernels have tests of these of their own, at lengths of several blocks.
HERE = sorted(set(OTHERS) - {'pallas'})
# Several blocks of every kind at the lengths below, other ones backward.
SMALL = BlockSizes(16, 8, 8, 16)
SIZES = dict.fromkeys(IMPLEMENTATIONS, SMALL) | {'pallas': None}


SHAPES = [
  dict(),
  dict(B=2, T=63, N=4, K=2, H=32),
  dict(B=1, T=5, N=2, K=2),
  dict(B=1, T=1, S=9, N=2, K=1),
  dict(B=2, T=1, S=9, N=6, K=3),
  dict(B=3, T=21, S=50, N=6, K=2, V=4),
  dict(B=2, T=63, N=4, K=2, H=32, dtype='bfloat16'),
]


@pytest.mark.parametrize('implementation', HERE)
@pytest.mark.parametrize(
  ('shape', 'normalizer'),
  [
    *((shape, 'softmax') for shape in SHAPES),
    *((SHAPES[i], n) for i in (2, 3, 6) for n in ('softpick', 'sigmoid')),
  ],
  ids=lambda x: case_id(**x) if isinstance(x, dict) else x,
)
def test_equals_reference_for_shape(implementation, shape, normalizer):
  inputs = make_inputs(**shape)
  options = dict(sink=normalizer == 'softmax', normalizer=normalizer)
  actual = run(
    implementation, inputs, block_sizes=SIZES[implementation], **options
  )
  expected = run('reference', inputs, **options)
  check(actual, expected, shape.get('dtype', 'float32'))


CASES = cases(37)


@pytest.mark.parametrize('implementation', HERE)
@pytest.mark.parametrize('case', CASES)
def test_equals_reference_for_option(implementation, case):
  inputs = make_inputs()
  options = CASES[case]
  actual = run(implementation, inputs, block_sizes=SMALL, **options)
  check(actual, run('reference', inputs, **options))


@pytest.mark.parametrize('normalizer', NORMALIZERS)
@pytest.mark.parametrize('implementation', ANYWHERE)
def test_equals_float64_oracle(implementation, normalizer, x64):
  inputs = make_inputs(dtype='float64')
  narrow = [x.astype(jnp.float32) for x in inputs]
  options = dict(sink='softmax' in normalizer, normalizer=normalizer)
  oracle = run('reference', inputs, **options)
  actual = run(
    implementation, narrow, block_sizes=SIZES[implementation], **options
  )
  check(actual, [x.astype(jnp.float32) for x in oracle])
  assert all(x.dtype == jnp.float32 for x in actual)


# Numerators, denominators and lse, of causal logits z and ok their pairs.
WRITTEN_OUT = {
  'softmax': lambda z, ok: (np.exp(z) * ok, (np.exp(z) * ok).sum(1)),
  'softmax1': lambda z, ok: (np.exp(z) * ok, 1 + (np.exp(z) * ok).sum(1)),
  'softpick': lambda z, ok: (
    np.maximum(np.exp(z) - 1, 0) * ok,
    (abs(np.exp(z) - 1) * ok).sum(1),
  ),
  'sigmoid': lambda z, ok: (ok / (1 + np.exp(-z)), np.ones(len(z))),
}


@pytest.mark.parametrize('normalizer', NORMALIZERS)
def test_reference_is_the_equation_written_out(normalizer):
  q, k, v, *_ = make_inputs(N=1, K=1, B=1, T=6)
  z = np.asarray(q)[0, :, 0] @ np.asarray(k)[0, :, 0].T * q.shape[-1] ** -0.5
  p, total = WRITTEN_OUT[normalizer](z, np.tril(np.ones((6, 6))))
  expected = p / total[:, None] @ np.asarray(v)[0, :, 0]
  out, lse = dot_product_attention(
    q, k, v, implementation='reference', return_lse=True, normalizer=normalizer
  )
  np.testing.assert_allclose(out[0, :, 0], expected, **tolerance('float32'))
  if normalizer == 'sigmoid':
    total = np.arange(1, 7)
  np.testing.assert_allclose(
    lse[0, :, 0], np.log(total), **tolerance('float32')
  )


@pytest.mark.parametrize('implementation', ANYWHERE)
def test_softpick_is_exact_for_small_logits(implementation, x64):
  inputs = make_inputs(dtype='float64')
  inputs = [x * 1e-3 if i < 2 else x for i, x in enumerate(inputs)]
  # A row of nothing but zeros is no attention, whatever came before.
  inputs[0] = inputs[0].at[:, 3].set(0)
  narrow = [x.astype(jnp.float32) for x in inputs]
  out, _, dq, *rest = run(
    implementation,
    narrow,
    block_sizes=SIZES[implementation],
    normalizer='softpick',
  )
  expected = run('reference', inputs, normalizer='softpick')
  np.testing.assert_allclose(out, expected[0], **tolerance('float32'))
  assert (out[:, 3] == 0).all() and (dq[:, 3] == 0).all()
  assert all(jnp.isfinite(x).all() for x in (dq, *rest))


@pytest.mark.parametrize('normalizer', ['softmax', 'softpick', 'sigmoid'])
@pytest.mark.parametrize('implementation', ANYWHERE)
def test_rows_without_keys_give_zeros_and_finite_gradients(
  implementation, normalizer
):
  inputs = make_inputs()
  segments = documents(2, 37)
  none = dict(q_segment_ids=segments, k_segment_ids=segments + 1)
  none |= dict(normalizer=normalizer)
  out, lse, *gradients = run(
    implementation, inputs, block_sizes=SIZES[implementation], **none
  )
  empty = segments == 0
  assert (out[empty] == 0).all() and (lse[empty] == -jnp.inf).all()
  assert (gradients[0][empty] == 0).all()
  assert all(jnp.isfinite(x).all() for x in (out, *gradients))
  assert jnp.isfinite(lse[~empty & (np.arange(37) > 30)]).any()


@pytest.mark.parametrize('normalizer', ['softmax', 'softpick', 'sigmoid'])
@pytest.mark.parametrize('implementation', OTHERS)
def test_extreme_logits_stay_finite(implementation, normalizer):
  q, k, *rest = make_inputs()
  inputs = (q * 1e4, k, *rest)
  options = dict(normalizer=normalizer)
  actual = run(
    implementation, inputs, block_sizes=SIZES[implementation], **options
  )
  assert all(jnp.isfinite(x).all() for x in actual)
  # The largest logit takes all: rounding of logits near 1e4 is 1e-3.
  expected = run('reference', inputs, **options)
  assert all(jnp.isfinite(x).all() for x in expected)
  np.testing.assert_allclose(actual[0], expected[0], atol=5e-3)


@pytest.mark.parametrize('implementation', ANYWHERE)
def test_gradient_reaches_allowed_keys_alone(implementation):
  mask = masks.SlidingWindow(5) | masks.Causal() & masks.PrefixColumns(2)
  q, k, v, *_ = make_inputs(B=1, T=21, N=2, K=2)
  segments = documents(1, 21)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None, None))
  def reach(t, k, v):
    def value(k, v):
      out = dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        q_segment_ids=segments,
        block_sizes=SIZES[implementation],
        implementation=implementation,
      )
      return out[0, t].sum()

    dk, dv = jax.grad(value, argnums=(0, 1))(k, v)
    return (abs(dk) + abs(dv).sum(-1, keepdims=True)).sum((0, 2, 3)) > 0

  same = segments[0][:, None] == segments[0][None]
  expected = mask.dense(21, 21) & same
  np.testing.assert_array_equal(reach(jnp.arange(21), k, v), expected)


@pytest.mark.parametrize('implementation', HERE)
def test_dropout_does_not_depend_on_block_sizes(implementation):
  inputs = make_inputs()
  results = [
    run(implementation, inputs, rate=0.5, block_sizes=sizes)
    for sizes in (SMALL, BlockSizes(7, 37, 16, 5, heads=1))
  ]
  check(*results)


def test_dropout_keeps_the_mean():
  q, k, v, *_ = make_inputs(B=4, T=64, N=8, K=8, V=1)
  out = [
    dot_product_attention(
      q * 0, k, v * 0 + 1, mask=masks.Full(), dropout=(rate, jax.random.key(0))
    )
    for rate in (0.0, 0.25)
  ]
  np.testing.assert_allclose(out[0], 1, **tolerance('float32'))
  # Means of 64 weights that are 0 or 1 / 0.75, and of all 2048 such means.
  assert abs(out[1].mean() - 1) < 0.01
  assert 0.05 < out[1].std() < 0.1


@pytest.mark.parametrize('implementation', ANYWHERE)
def test_works_under_vmap_and_shard_map(implementation):
  inputs = make_inputs(B=4)
  q, k, v = inputs[:3]
  attend = functools.partial(
    dot_product_attention,
    implementation=implementation,
    block_sizes=SIZES[implementation],
  )

  def gradients(attend, *arrays):
    def loss(q, k, v):
      return (attend(q, k, v) ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('data')
  expected = gradients(attend, q, k, v)
  # Interpreted kernels do not say over which axes their values vary.
  for check_vma in (False, True)[: 1 if implementation == 'pallas' else 2]:
    sharded = jax.shard_map(
      attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    for x, y in zip(gradients(sharded, q, k, v), expected, strict=True):
      np.testing.assert_allclose(x, y, **tolerance('float32'))
  mapped = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])
  for x, y in zip(gradients(mapped, q, k, v), expected, strict=True):
    np.testing.assert_allclose(x, y, **tolerance('float32'))


SECOND = {
  'causal': dict(),
  'packed': dict(q_segment_ids=documents(2, 19)),
  # Rows without keys, and everything that acts on logits or weights.
  'masked-rows': dict(
    q_segment_ids=documents(2, 19),
    k_segment_ids=documents(2, 19) + 1,
    logits_soft_cap=2.0,
    alibi_slopes=np.float32([1, 0.5, 0.25, 0.125]),
    dropout=(0.3, jax.random.key(0)),
  ),
  'softmax1': dict(normalizer='softmax1', mask=masks.SlidingWindow(5)),
  'softpick': dict(normalizer='softpick'),
  'sigmoid': dict(normalizer='sigmoid'),
}


def loss(inputs, implementation, **options):
  out, lse = dot_product_attention(
    *inputs, implementation=implementation, return_lse=True, **options
  )
  return (out**2).sum() + (jnp.where(lse > -jnp.inf, lse, 0) ** 2).sum()


@pytest.mark.parametrize('implementation', HERE)
@pytest.mark.parametrize(
  ('case', 'mode'),
  [
    ('causal', 'forward'),
    ('causal', 'reverse'),
    ('packed', 'reverse'),
    ('masked-rows', 'forward'),
    ('softmax1', 'reverse'),
    ('softpick', 'forward'),
    ('sigmoid', 'reverse'),
  ],
)
def test_second_derivative_equals_that_of_the_reference(
  case, mode, implementation, x64
):
  inputs = make_inputs(T=19, H=4, V=3, dtype='float64')[:3]
  direction = make_inputs(T=19, H=4, V=3, dtype='float64', seed=4)[:3]

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def second(inputs, implementation, sizes):
    gradients = jax.grad(
      lambda x: loss(x, implementation, block_sizes=sizes, **SECOND[case])
    )
    if mode == 'forward':
      return jax.jvp(gradients, (inputs,), (direction,))[1]
    _, vjp = jax.vjp(gradients, inputs)
    return vjp(direction)[0]

  actual = second(inputs, implementation, BlockSizes(8, 4, 4, 8))
  expected = second(inputs, 'reference', None)
  for x, y in zip(actual, expected, strict=True):
    np.testing.assert_allclose(x, y, **tolerance('float64'))


@pytest.mark.parametrize('order', [1, 2])
def test_xla_saves_nothing_that_grows_with_the_square(order):
  def saved(T):
    f = functools.partial(loss, implementation='xla', block_sizes=SMALL)
    f = jax.grad(f) if order == 2 else f
    inputs = make_inputs(B=1, T=T)[:3]
    _, vjp = jax.eval_shape(functools.partial(jax.vjp, f), inputs)
    return sum(x.size for x in jax.tree.leaves(vjp))

  # The second time also the numbers of the blocks, three for each.
  blocks = 3 * (512 // 8) * (512 // 16) * (order - 1)
  assert saved(512) <= 2 * saved(256) + 2 * blocks


def test_an_unknown_name_lists_the_known_ones():
  q, k, v, *_ = make_inputs()
  with pytest.raises(ValueError, match='reference'):
    dot_product_attention(q, k, v, implementation='fast')
  with pytest.raises(ValueError, match='softmax1'):
    dot_product_attention(q, k, v, normalizer='softmax2')


@pytest.mark.parametrize('normalizer', ['softpick', 'sigmoid'])
def test_a_sink_outside_of_a_softmax_is_refused(normalizer):
  q, k, v, sink_logits, *_ = make_inputs()
  with pytest.raises(NotImplementedError, match=normalizer):
    dot_product_attention(
      q, k, v, normalizer=normalizer, sink_logits=sink_logits
    )


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(q_positions=np.arange(36)), 'q_positions'),
    (dict(k_positions=np.zeros((3, 37), int)), 'k_positions'),
    (dict(q_segment_ids=np.zeros((1, 37), int)), 'q_segment_ids'),
    (dict(k_segment_ids=np.zeros((2, 37), int)), 'both'),
    (dict(logits_soft_cap=0.0), 'logits_soft_cap'),
  ],
)
def test_a_wrong_option_is_named(options, message):
  q, k, v, *_ = make_inputs()
  with pytest.raises(ValueError, match=message):
    dot_product_attention(q, k, v, **options)


def test_heads_that_do_not_divide_are_refused():
  q, k, v, *_ = make_inputs(N=4, K=3)
  with pytest.raises(ValueError, match='N=4 query heads'):
    dot_product_attention(q, k, v)
  with pytest.raises(ValueError, match='block_q=0'):
    BlockSizes(block_q=0)


def test_a_dropout_rate_of_one_is_refused():
  q, k, v, *_ = make_inputs()
  with pytest.raises(ValueError, match='rate'):
    dot_product_attention(q, k, v, dropout=(1.0, jax.random.key(0)))
