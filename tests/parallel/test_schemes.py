"""Attention on eight devices is that of the equation, in float64, on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import parallel
from longctx.masks import (
  Causal,
  Full,
  GlobalTokens,
  PrefixColumns,
  RandomBlocks,
  SlidingWindow,
)
from longctx.ops.dot_product_attention import BlockSizes
from longctx.ops.dot_product_attention import (
  dot_product_attention as on_one_device,
)
from longctx.ops.rope import apply_rope
from longctx.parallel.layout import LAYOUTS, SequenceLayout
from longctx.parallel.mesh import make_mesh
from tests.tolerances import case_id, tolerance

# An odd length, which every layout pads.
B, T, N, H, V = 2, 67, 8, 4, 6

# What each scheme runs on: axes of the mesh, and those of the sequence.
PLACES = {
  'ring': (dict(seq=8), 'seq'),
  'ulysses': (dict(seq=8), 'seq'),
  'all_gather': (dict(seq=8), 'seq'),
  'ring+ulysses': (dict(seq=4, model=2), ('seq', 'model')),
}

# Compiling is nearly all of the time, and these programs are small.
FAST = {'xla_backend_optimization_level': 0}


def documents(T=T, *, seed=1):
  """Segment ids of packed documents, cut elsewhere in each batch row."""
  rng = np.random.default_rng(seed)
  return np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)


def shuffled(T=T, *, seed=2):
  """Positions in another order in each batch row."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.permutation(T) for _ in range(B)]).astype(np.int32)


SLOPES = np.float32(2.0 ** -np.arange(1, N + 1))

CASES = {
  'causal': dict(),
  # One hop reaches as far as these windows; 'wide' takes several.
  'window': dict(mask=SlidingWindow(5)),
  'sinks': dict(mask=Causal() & PrefixColumns(3) | SlidingWindow(5)),
  'longformer': dict(mask=SlidingWindow(4, 4) | GlobalTokens(3)),
  'packed': dict(q_segment_ids=documents()),
  'full': dict(mask=Full()),
  'wide': dict(mask=SlidingWindow(29)),
  'wide-sinks': dict(mask=Causal() & PrefixColumns(3) | SlidingWindow(29)),
  'two-sided': dict(mask=SlidingWindow(3, 12)),
  'ahead': dict(mask=SlidingWindow(0, 7)),
  'far': dict(mask=RandomBlocks(4, 1, 0) & Causal() | SlidingWindow(2)),
  'packed-longformer': dict(
    mask=SlidingWindow(4, 4) | GlobalTokens(3), q_segment_ids=documents()
  ),
  # The one of 'softmax1' and the sink logits count once, not once per device.
  'logits': dict(
    logits_soft_cap=1.5, alibi_slopes=SLOPES, normalizer='softmax1', sink=True
  ),
  'softpick': dict(
    normalizer='softpick',
    mask=Causal() & PrefixColumns(3) | SlidingWindow(29),
    rate=0.3,
  ),
  'sigmoid': dict(
    normalizer='sigmoid',
    mask=SlidingWindow(4, 4) | GlobalTokens(3),
    q_segment_ids=documents(),
  ),
  'shuffled': dict(q_positions=shuffled(), k_positions=shuffled()),
  'one-order': dict(
    q_positions=shuffled()[0], k_positions=shuffled()[0], mask=SlidingWindow(9)
  ),
  # Ten queries from the next chunk, on keys at their natural positions.
  'later-queries': dict(q_positions=np.arange(T, dtype=np.int32) + 10),
  'dropout': dict(rate=0.3),
  'masked-rows': dict(q_segment_ids=documents(), k_segment_ids=documents() + 2),
  'everything': dict(
    mask=Causal() & PrefixColumns(3) | SlidingWindow(5),
    q_segment_ids=documents(),
    q_positions=shuffled(),
    k_positions=shuffled(),
    alibi_slopes=SLOPES,
    logits_soft_cap=1.5,
    sink=True,
    rate=0.3,
  ),
}


def make_inputs(K=2, T=T, S=None, dtype='float32'):
  """q, k, v, sink_logits and the cotangents of out and lse, float64."""
  rng = np.random.default_rng(0)
  S = S or T
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, V), (N,), (B, T, N, V)]
  shapes.append((B, T, N))
  arrays = [rng.normal(size=shape) for shape in shapes]
  # What the dtype holds, so that inputs are no part of the error.
  return [np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays]


REFERENCE = functools.partial(on_one_device, implementation='reference')


def run(
  attend, inputs, dtypes, *, sink=False, rate=0.0, sharding=None, **options
):
  """out, lse and the gradients of q, k, v and sink_logits from both.

  Args:
    attend: the attention to call.
    inputs: from `make_inputs`.
    dtypes: of the arrays, and of lse.
    sink: whether to pass sink_logits on.
    rate: of dropout.
    sharding: of the inputs with a sequence, and so of the results; or None.
    options: for `attend`.
  """
  *inputs, lse_bar = inputs
  inputs = [jnp.asarray(x, dtypes[0]) for x in inputs]
  inputs.append(jnp.asarray(lse_bar, dtypes[1]))
  if sharding:
    inputs = [jax.device_put(x, sharding) if x.ndim > 1 else x for x in inputs]

  def call(q, k, v, sink_logits):
    extra = dict(options)
    if sink:
      extra['sink_logits'] = sink_logits
    if rate:
      extra['dropout'] = (rate, jax.random.key(3))
    return attend(q, k, v, return_lse=True, **extra)

  @jax.jit
  def both(*inputs):
    results, vjp = jax.vjp(call, *inputs[:4])
    return *results, *vjp(inputs[4:])

  compiled = both.lower(*inputs).compile(compiler_options=FAST)
  results = compiled(*inputs)
  if sharding:
    for x in results[:2]:
      assert x.sharding.is_equivalent_to(sharding, x.ndim)
  return [np.asarray(x) for x in results]


@functools.cache
def oracle(case, K=2, T=T, dtype='float32'):
  """The equation in float64."""
  inputs = make_inputs(K, T, dtype=dtype)
  with jax.enable_x64(True):
    return run(REFERENCE, inputs, ['float64'] * 2, **CASES[case])


def on_mesh(scheme, axes=None, axis=None, **settings):
  """Attention by a scheme on the mesh that it takes, or on another one."""
  mesh = make_mesh(**(axes or PLACES[scheme][0]))
  axis = axis or PLACES[scheme][1]
  return functools.partial(
    parallel.dot_product_attention,
    mesh=mesh,
    axis=axis,
    scheme=scheme,
    **settings,
  )


def check(actual, expected, dtype='float32', names=None):
  """Compares, errors in units of the largest entry if that is above 1."""
  names = names or ('out', 'lse', 'dq', 'dk', 'dv', 'dsink')
  for name, x, y in zip(names, actual, expected, strict=True):
    assert x.shape == y.shape, name
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(y)
    # Rows without keys have the same lse, -inf, in both.
    np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=name)
    size = max(1, np.abs(y[finite]).max(initial=0))
    np.testing.assert_allclose(
      x[finite] / size, y[finite] / size, err_msg=name, **tolerance(dtype)
    )


def check_case(scheme, case, K=2, T=T, axes=None, axis=None, **settings):
  attend = on_mesh(scheme, axes, axis, **settings)
  actual = run(attend, make_inputs(K, T), ['float32'] * 2, **CASES[case])
  assert all(x.dtype == np.float32 for x in actual)
  check(actual, oracle(case, K, T))


@pytest.mark.parametrize('K', [2, N], ids=['gqa', 'mha'])
@pytest.mark.parametrize(
  'case', ['causal', 'window', 'sinks', 'longformer', 'packed', 'full']
)
@pytest.mark.parametrize('scheme', PLACES)
def test_every_scheme_is_exact(scheme, case, K):
  check_case(scheme, case, K)


@pytest.mark.parametrize(
  ('scheme', 'case', 'layout'),
  [
    *(
      ('ring', case, layout)
      for case in ('causal', 'window', 'sinks', 'longformer', 'packed')
      for layout in ('contiguous', 'striped')
    ),
    ('ulysses', 'packed', 'striped'),
    ('all_gather', 'longformer', 'striped'),
    ('ring+ulysses', 'sinks', 'contiguous'),
    ('ring+ulysses', 'packed', 'striped'),
  ],
)
def test_every_layout_is_exact(scheme, case, layout):
  check_case(scheme, case, layout=layout)


@pytest.mark.parametrize(
  ('scheme', 'case'),
  [
    ('ring', 'wide'),
    ('ring', 'wide-sinks'),
    ('ring', 'two-sided'),
    ('ring', 'ahead'),
    ('ring', 'far'),
    ('ring', 'packed-longformer'),
    ('ring', 'logits'),
    ('ring', 'one-order'),
    ('ring', 'later-queries'),
    ('ring', 'masked-rows'),
    ('ring', 'dropout'),
    ('ring', 'softpick'),
    ('ring', 'sigmoid'),
    ('ulysses', 'softpick'),
    ('all_gather', 'sigmoid'),
    ('ring+ulysses', 'sigmoid'),
    *((scheme, 'everything') for scheme in PLACES),
  ],
)
def test_every_option_is_exact(scheme, case):
  check_case(scheme, case)


@pytest.mark.parametrize(
  ('scheme', 'case', 'axes', 'axis'),
  [
    ('ring', 'everything', dict(data=2, seq=2, model=2), 'seq'),
    ('ring', 'longformer', dict(data=2, seq=2, model=2), 'seq'),
    ('ulysses', 'everything', dict(data=2, seq=2, model=2), 'seq'),
    ('all_gather', 'everything', dict(data=2, seq=2, model=2), 'seq'),
    ('ring+ulysses', 'dropout', dict(data=2, seq=2, model=2), None),
    ('all_gather', 'causal', dict(seq=4, model=2), ('seq', 'model')),
    ('ring', 'causal', dict(), 'seq'),
    ('ring', 'packed', dict(seq=2), 'seq'),
    ('ring', 'sinks', dict(seq=3), 'seq'),
    ('ulysses', 'causal', dict(seq=2), 'seq'),
    # Key heads are repeated as often as the devices ask for.
    ('ring+ulysses', 'causal', dict(seq=2, model=4), None),
  ],
  ids=lambda x: (
    case_id(**x).removesuffix('-f32') if isinstance(x, dict) else None
  ),
)
def test_every_mesh_is_exact(scheme, case, axes, axis):
  check_case(scheme, case, axes=axes, axis=axis)


@pytest.mark.parametrize(
  ('scheme', 'T', 'layout'),
  [
    *(('ring', 5, layout) for layout in LAYOUTS),
    ('ring', 1, 'zigzag'),
    ('ring+ulysses', 5, 'zigzag'),
  ],
)
def test_fewer_tokens_than_devices(scheme, T, layout):
  check_case(scheme, 'causal', T=T, layout=layout)


@pytest.mark.parametrize(
  ('scheme', 'case'),
  [
    ('ring', 'everything'),
    ('ring', 'longformer'),
    ('all_gather', 'everything'),
  ],
)
def test_block_sizes_change_nothing(scheme, case):
  # Several blocks per shard, and the same weights dropped.
  check_case(scheme, case, block_sizes=BlockSizes(4, 3, 3, 5, heads=1))


@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_second_derivative_of_a_ring_is_exact(mode, x64):
  inputs = [jnp.asarray(x) for x in make_inputs(T=13)[:3]]
  direction = [jnp.cos(x) for x in inputs]
  mask = SlidingWindow(4, 4) | GlobalTokens(1)

  def second(attend):
    def loss(inputs):
      out, lse = attend(*inputs, mask=mask, return_lse=True)
      return (out**2).sum() + (lse**2).sum()

    def along(inputs):
      if mode == 'forward':
        return jax.jvp(jax.grad(loss), (inputs,), (direction,))[1]
      _, vjp = jax.vjp(jax.grad(loss), inputs)
      return vjp(direction)[0]

    compiled = jax.jit(along).lower(inputs).compile(compiler_options=FAST)
    return compiled(inputs)

  actual = second(on_mesh('ring', dict(seq=2)))
  for x, y in zip(actual, second(REFERENCE), strict=True):
    np.testing.assert_allclose(x, y, **tolerance('float64'))


@pytest.mark.parametrize('scheme', ['ring', 'ring+ulysses'])
def test_bfloat16_is_rounded_once(scheme):
  inputs = make_inputs(dtype='bfloat16')
  actual = run(on_mesh(scheme), inputs, ['bfloat16', 'float32'])
  assert [x.dtype.name for x in actual] == [
    'bfloat16',
    'float32',
    *['bfloat16'] * 4,
  ]
  check(actual, oracle('causal', dtype='bfloat16'), 'bfloat16')


@pytest.mark.parametrize(
  ('scheme', 'packed', 'normalizer'),
  [
    ('ring', True, 'softmax'),
    ('ring+ulysses', False, 'softmax'),
    ('ring', False, 'sigmoid'),
  ],
)
def test_few_queries_read_keys_of_all_devices(scheme, packed, normalizer):
  positions = np.array([66, 3, 40, 40, 9], np.int32)
  options = dict(q_positions=positions, mask=CASES['sinks']['mask'])
  if packed:
    ids = documents()
    options |= dict(q_segment_ids=ids[:, positions], k_segment_ids=ids)
  inputs = make_inputs(T=len(positions), S=T)
  sink = normalizer == 'softmax'
  options |= dict(sink=sink, rate=0.2, normalizer=normalizer)
  with jax.enable_x64(True):
    expected = run(REFERENCE, inputs, ['float64'] * 2, **options)
  check(run(on_mesh(scheme), inputs, ['float32'] * 2, **options), expected)


def test_few_queries_on_a_mesh_with_batch_and_heads():
  positions = np.array([[66, 3, 40], [1, 2, 50]], np.int32)
  options = dict(q_positions=positions, alibi_slopes=SLOPES, rate=0.2)
  inputs = make_inputs(T=3, S=T)
  with jax.enable_x64(True):
    expected = run(REFERENCE, inputs, ['float64'] * 2, **options)
  attend = on_mesh('ring', dict(data=2, seq=2, model=2))
  check(run(attend, inputs, ['float32'] * 2, **options), expected)


def rotated(attend, positions):
  """Attention of queries and keys that are turned by their positions."""

  def call(q, k, v, **options):
    q, k = (apply_rope(x, jnp.asarray(positions)) for x in (q, k))
    return attend(q, k, v, **options)

  return call


@functools.cache
def rotated_oracle():
  with jax.enable_x64(True):
    attend = rotated(REFERENCE, np.arange(T))
    return run(attend, make_inputs(), ['float64'] * 2)


def in_layout(layout, inputs):
  """Padding holds anything, and does not count in a loss."""
  q, k, v, sink, *bars = inputs
  placed = [layout.apply(x, fill=-3.0) for x in (q, k, v)]
  return [*placed, sink, *(layout.apply(x) for x in bars)]


def restored(layout, results):
  return [*(layout.restore(x) for x in results[:5]), results[5]]


@pytest.mark.parametrize(
  ('scheme', 'name'),
  [
    *(('ring', name) for name in LAYOUTS),
    ('ulysses', 'zigzag'),
    ('all_gather', 'striped'),
    ('ring+ulysses', 'zigzag'),
  ],
)
def test_arrays_in_the_layout_stay_in_it(scheme, name):
  axes, axis = PLACES[scheme]
  layout = SequenceLayout(name, T, 8)
  attend = on_mesh(scheme, layout=layout, in_layout=True)
  actual = run(
    rotated(attend, layout.order),
    in_layout(layout, make_inputs()),
    ['float32'] * 2,
    sharding=NamedSharding(make_mesh(**axes), P(None, axis)),
  )
  check(restored(layout, actual), rotated_oracle())


def test_jit_changes_nothing():
  attend = on_mesh('ring', dict(seq=2))
  q, k, v, *_ = (jnp.asarray(x, jnp.float32) for x in make_inputs())
  np.testing.assert_allclose(
    attend(q, k, v), oracle('causal')[0], **tolerance('float32')
  )


@pytest.mark.parametrize('scheme', ['ring', 'ulysses'])
def test_padding_at_positions_of_tokens_is_not_read(scheme):
  layout = SequenceLayout('zigzag', T, 8)
  batch = layout.place(dict(tokens=shuffled(), positions=shuffled()))
  actual = run(
    on_mesh(scheme, layout=layout, in_layout=True),
    in_layout(layout, make_inputs()),
    ['float32'] * 2,
    q_positions=batch['positions'],
    k_positions=batch['positions'],
    q_segment_ids=batch['segment_ids'],
  )
  check(restored(layout, actual), oracle('shuffled'))


WRONG = [
  (dict(scheme='star'), ValueError, 'known: ring, ulysses'),
  (dict(layout='zigzig'), ValueError, 'known: contiguous, zigzag'),
  (dict(axis='rows'), ValueError, "axis='rows' must be of the mesh"),
  (dict(axis=()), ValueError, 'must be of the mesh'),
  (dict(axis=('seq', 'model')), ValueError, "scheme='ring' needs 1 mesh ax"),
  (dict(scheme='ring+ulysses'), ValueError, 'needs 2 mesh axes'),
  (
    dict(scheme='ulysses', axis=('seq', 'model')),
    ValueError,
    'needs 1 mesh axes',
  ),
  (dict(scheme='ulysses', N=2), ValueError, 'must divide 1 heads'),
  (
    dict(scheme='ring+ulysses', axis=('seq', 'model'), N=3, K=1),
    ValueError,
    'must divide 3 heads',
  ),
  (dict(N=3, K=1), ValueError, 'query_heads=3 must be a multiple'),
  (dict(N=4, K=1), ValueError, 'key_heads=1 must be a multiple'),
  (dict(B=3), ValueError, 'batch=3 must be a multiple'),
  (
    dict(implementation='reference'),
    NotImplementedError,
    'no parts for a ring to merge',
  ),
  (
    dict(
      implementation='reference',
      scheme='ring+ulysses',
      axis=('seq', 'model'),
    ),
    NotImplementedError,
    'no parts for a ring to merge',
  ),
  (dict(implementation='fast'), ValueError, "unknown implementation='fast'"),
  (
    dict(normalizer='softpick', sink_logits=jnp.zeros(4)),
    NotImplementedError,
    "normalizer='softpick' is none",
  ),
  (dict(normalizer='softmax2'), ValueError, "unknown normalizer='softmax2'"),
  (
    dict(layout=SequenceLayout('zigzag', 8, 4)),
    ValueError,
    'num_shards=4 must be the 2 shards',
  ),
  (
    dict(layout=SequenceLayout('zigzag', 9, 2), in_layout=True),
    ValueError,
    'must have length 12',
  ),
  (
    dict(layout='zigzag', T=9, in_layout=True),
    ValueError,
    'give a SequenceLayout',
  ),
  (
    dict(layout=SequenceLayout('zigzag', 9, 2)),
    ValueError,
    'must have length 9',
  ),
  (
    dict(q_segment_ids=np.zeros((2, 7), np.int32)),
    ValueError,
    'q_segment_ids must have length=8',
  ),
  (dict(dropout=(1.5, jax.random.key(0))), ValueError, 'rate=1.5'),
  (dict(replicated=True, scheme='star'), ValueError, 'known: ring, ulysses'),
]


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  WRONG,
  ids=[
    '-'.join(f'{n}' for n in change) + f'-{i}'
    for i, (change, _, _) in enumerate(WRONG)
  ],
)
def test_what_cannot_work_says_what_to_change(change, error, message):
  call = dict(B=2, T=8, N=4, K=2, replicated=False) | change
  B, T, N, K, replicated = (
    call.pop(name) for name in ('B', 'T', 'N', 'K', 'replicated')
  )
  q, k = jnp.zeros((B, 3 if replicated else T, N, 4)), jnp.zeros((B, T, K, 4))
  mesh = make_mesh(data=2, seq=2, model=2)
  with pytest.raises(error, match=message):
    parallel.dot_product_attention(q, k, k, mesh=mesh, **call)
