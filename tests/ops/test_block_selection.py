"""Chosen blocks: the equations in float64, and what choosing must not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.block_selection import (
  IMPLEMENTATIONS,
  Compression,
  blockwise,
  moba,
  nsa,
  tiles,
)
from longctx.ops.dot_product_attention import dot_product_attention
from longctx.ops.rope import Rope
from tests.tolerances import case_id, tolerance

# Compiling is nearly all of the time, and these programs are small.
FAST = {'xla_backend_optimization_level': 0}

B, H, V = 2, 4, 6
SLOPES = np.float32([0.5, 0.25, 0.1, 0.02])


def make_arrays(op, T, *, N=4, K=2, S=None, block=4, hidden=5, dtype='float32'):
  """Arguments of an op by name, float64 numbers that the dtype holds."""
  rng = np.random.default_rng(T)
  S = S or T
  keys, values = (B, S, K, H), (B, S, K, V)
  shapes = {'q': (B, T, N, H)}
  if op is moba:
    shapes |= {'k': keys, 'v': values}
  else:
    for branch in ('compressed', 'selected'):
      shapes |= {f'k_{branch}': keys, f'v_{branch}': values}
  arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  if op is nsa:
    for name, width in (('compress_k', H), ('compress_v', V)):
      inner = rng.normal(size=(block, width, hidden)) / np.sqrt(block * width)
      arrays[name] = Compression(
        rng.normal(size=(block, width)),
        inner,
        rng.normal(size=(hidden, width)),
      )
  # What the dtype holds, so that inputs are no part of the error.
  rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)
  return jax.tree.map(rounded, arrays)


def documents(T):
  """Segment ids, cut elsewhere in each row; an id that comes back in one."""
  rng = np.random.default_rng(T)
  ids = np.sort(rng.integers(0, 3, (B, T)), axis=1)
  ids[1, -2:] = ids[1, 0]
  return jnp.asarray(ids, jnp.int32)


def shuffled(T):
  """Positions in another order in each row, some of them twice in one."""
  rng = np.random.default_rng(T + 1)
  positions = np.stack([rng.permutation(T), rng.integers(0, T, T)])
  return jnp.asarray(positions, jnp.int32)


def with_gradients(op, arrays, dtype, **options):
  """(out and lse of each branch, gradients of a fixed sum of them)."""

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(arrays):
    call = lambda arrays: op(**arrays, **options, return_lse=True)
    results, vjp = jax.vjp(call, arrays)
    rng = np.random.default_rng(0)
    bars = [rng.normal(size=x.shape) for x in jax.tree.leaves(results)]
    bars = jax.tree.unflatten(jax.tree.structure(results), bars)
    bars = jax.tree.map(lambda b, x: jnp.asarray(b, x.dtype), bars, results)
    return results, vjp(bars)[0]

  return run(jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays))


def assert_close(actual, expected, dtype='float32'):
  """Leaf by leaf, errors in units of the largest entry if above 1."""
  for (path, x), y in zip(
    jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0))
    np.testing.assert_allclose(
      x / size,
      y / size,
      err_msg=jax.tree_util.keystr(path),
      **tolerance(dtype),
    )


SETTINGS = {
  moba: dict(block_size=4, top_k=3),
  nsa: dict(
    block_size=4, top_n=4, stride=2, num_local=1, rope=Rope(base=100.0)
  ),
}


def case(op, T, dtype='float32', *, indices='', N=4, K=2, S=None, **changes):
  name = case_id(T=T, N=N, K=K, dtype=dtype)
  parts = [op.__name__, name, indices]
  parts += [f'{x}{y}' for x, y in changes.items()]
  shape = dict(N=N, K=K, S=S)
  return pytest.param(
    op, T, dtype, indices, shape, changes, id='-'.join(filter(None, parts))
  )


CASES = [
  case(moba, 37),
  case(moba, 3, K=4),
  case(moba, 37, 'float64', K=1),
  case(moba, 37, 'bfloat16'),
  case(moba, 37, indices='packed'),
  case(moba, 37, indices='packed-shuffled', block_size=3),
  case(moba, 37, indices='shuffled', top_k=2),
  case(moba, 37, indices='packed', alibi=True),
  case(moba, 37, indices='packed-shuffled', alibi=True, rate=0.3),
  case(moba, 21, top_k=1),
  case(moba, 21, top_k=99, block_size=1),
  case(moba, 5, indices='later', S=37),
  case(nsa, 37),
  case(nsa, 3, K=4),
  case(nsa, 37, 'float64', K=1, block_size=2),
  case(nsa, 37, 'bfloat16'),
  case(nsa, 37, indices='packed'),
  case(nsa, 37, indices='packed-shuffled', num_local=2),
  case(nsa, 37, indices='shuffled', num_initial=0, stride=1, top_n=3),
  case(nsa, 21, num_initial=2, num_local=2, block_size=8),
  case(nsa, 5, indices='later', S=37, rope=None, stride=4),
]


@pytest.mark.parametrize(
  ('op', 'T', 'dtype', 'indices', 'shape', 'changes'), CASES
)
def test_blockwise_equals_the_equation(
  op, T, dtype, indices, shape, changes, x64
):
  arrays = make_arrays(op, T, dtype=dtype, **shape)
  options = SETTINGS[op] | changes
  if 'packed' in indices:
    options['q_segment_ids'] = documents(T)
  if 'shuffled' in indices:
    options['q_positions'] = options['k_positions'] = shuffled(T)
  if indices == 'later':
    options['q_positions'] = jnp.arange(T) * 9 - 1
  if options.pop('alibi', False):
    options['alibi_slopes'] = SLOPES
  if 'rate' in options:
    options['dropout'] = (options.pop('rate'), jax.random.key(3))
  run = functools.partial(with_gradients, op, arrays, **options)
  actual = run(dtype, implementation='xla')
  expected = run('float64', implementation='reference')
  for out, lse in actual[0] if op is nsa else actual[:1]:
    assert out.dtype == dtype
    assert lse.dtype == ('float64' if dtype == 'float64' else 'float32')
  assert_close(actual, expected, dtype)


OPS = pytest.mark.parametrize('op', [moba, nsa])
EACH = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def run(op, arrays, dtype='float32', **options):
  """An op, compiled."""
  fn = functools.partial(op, **SETTINGS[op] | options)
  arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)
  return jax.jit(lambda x: fn(**x), compiler_options=FAST)(arrays)


def weights_of(op, arrays, **options):
  """[B, N, T, S], what each head gives to each key: values of one each."""
  S, K = arrays['k' if op is moba else 'k_selected'].shape[1:3]
  values = np.broadcast_to(np.eye(S)[:, None], (B, S, K, S))
  if op is moba:
    out = run(op, arrays | {'v': values}, **options)
  else:
    arrays = arrays | {'v_compressed': values, 'v_selected': values}
    shapes = ((4, S), (4, S, 1), (1, S))
    arrays['compress_v'] = Compression(*map(np.zeros, shapes))
    _, out = run(op, arrays, **options)
  return np.asarray(out).swapaxes(1, 2)


@OPS
@EACH
def test_packed_documents_equal_separate_documents(op, implementation):
  arrays = make_arrays(op, 29)
  tokens = {n: x for n, x in arrays.items() if not isinstance(x, Compression)}
  ids = jnp.asarray(
    [[7] * 9 + [2] * 9 + [9] * 11, [0] * 9 + [1] * 9 + [2] * 11]
  )
  # Anew in each document, as a document alone has them.
  positions = jnp.asarray([*range(9), *range(9), *range(11)])
  packed = run(
    op,
    arrays,
    q_positions=positions,
    k_positions=positions,
    q_segment_ids=ids,
    implementation=implementation,
  )
  for part in (slice(0, 9), slice(9, 18), slice(18, 29)):
    document = {name: x[:, part] for name, x in tokens.items()}
    alone = run(op, arrays | document, implementation=implementation)
    assert_close(jax.tree.map(lambda x, part=part: x[:, part], packed), alone)


@EACH
def test_all_blocks_are_full_attention(implementation):
  arrays = make_arrays(moba, 21)
  ids = documents(21)
  out = run(
    moba, arrays, top_k=6, q_segment_ids=ids, implementation=implementation
  )
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
  assert_close(out, dot_product_attention(**arrays, q_segment_ids=ids))


@EACH
def test_of_equal_gates_the_earlier_block_is_chosen(implementation):
  arrays = make_arrays(moba, 18)
  arrays['k'] = 0 * arrays['k']
  weights = weights_of(moba, arrays, implementation=implementation)
  for t in range(18):
    # Two blocks beside its own, fewer where there are not as many.
    read = {s for s in range(t + 1) if s < 8 or s // 4 == t // 4}
    expected = [1 / len(read) if s in read else 0 for s in range(18)]
    np.testing.assert_allclose(
      weights[:, :, t],
      np.broadcast_to(expected, (B, 4, 18)),
      **tolerance('float32'),
    )


@OPS
@EACH
def test_a_planted_block_is_chosen(op, implementation):
  # Keys far from the query's direction, but for those of block 2.
  T, rng = 30, np.random.default_rng(0)
  arrays = make_arrays(op, T)
  arrays['q'] = np.broadcast_to([1.0, 0, 0, 0], (B, T, 4, H))
  keys = 0.1 * rng.normal(size=(B, T, 2, H))
  keys[:, 8:12, :, 0] += 3
  if op is moba:
    arrays['k'] = keys
    options = dict(top_k=2)
  else:
    arrays['k_compressed'] = arrays['k_selected'] = keys
    # The mean of a block.
    mean = np.broadcast_to(np.eye(H) / 4, (4, H, H))
    arrays['compress_k'] = Compression(np.zeros((4, H)), mean, np.eye(H))
    options = dict(top_n=3, rope=None)
  weights = weights_of(op, arrays, implementation=implementation, **options)
  for t in range(12, T):
    assert (weights[:, :, t, 8:12] > 0.1).all()
  read = weights > 0
  read[..., 8:12] = False
  # Beside it the query's own block, and for NSA the first one.
  blocks = np.arange(T) // 4
  own = blocks[:, None] == blocks
  assert not read[:, :, 12:][
    ..., ~(own | (op is nsa) & (blocks == 0))[12:]
  ].any()


@OPS
def test_heads_of_a_group_share_their_choice_in_nsa_alone(op):
  read = weights_of(op, make_arrays(op, 61)) > 0
  assert (read[:, 0] == read[:, 1]).all() == (op is nsa)
  assert (read[:, 2] == read[:, 3]).all() == (op is nsa)
  assert not (read[:, 1] == read[:, 2]).all()


@OPS
@EACH
def test_query_without_keys_gets_zeros(op, implementation):
  arrays = make_arrays(op, 9)
  ids = jnp.zeros((B, 9), jnp.int32).at[:, 3:].set(4)
  results, gradients = with_gradients(
    op,
    arrays,
    'float32',
    **SETTINGS[op],
    q_segment_ids=ids,
    k_segment_ids=ids.at[:, 3:].set(5),
    implementation=implementation,
  )
  for out, lse in results if op is nsa else [results]:
    assert not out[:, 3:].any()
    assert (lse[:, 3:] == -np.inf).all()
  assert not gradients['q'][:, 3:].any()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@OPS
def test_huge_numbers_stay_finite(op):
  arrays = make_arrays(op, 21)
  arrays = {
    name: x if isinstance(x, Compression) else 1e4 * x
    for name, x in arrays.items()
  }
  results, gradients = with_gradients(op, arrays, 'float32', **SETTINGS[op])
  outs = [out for out, _ in results] if op is nsa else results[:1]
  assert all(np.isfinite(x).all() for x in outs)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@OPS
@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_second_derivative_is_that_of_the_equation(op, mode, x64):
  arrays = jax.tree.map(jnp.asarray, make_arrays(op, 13))

  def second(implementation):
    def loss(arrays):
      out = op(**arrays, **SETTINGS[op], implementation=implementation)
      return sum(jnp.sin(x).sum() for x in jax.tree.leaves(out))

    if mode == 'forward':
      tangents = jax.tree.map(jnp.cos, arrays)
      run = lambda x: jax.jvp(jax.grad(loss), (x,), (tangents,))[1]
    else:
      norm = lambda x: sum((g**2).sum() for g in jax.tree.leaves(x))
      run = jax.grad(lambda x: norm(jax.grad(loss)(x)))
    return jax.jit(run, compiler_options=FAST)(arrays)

  assert_close(second('xla'), second('reference'), 'float64')


@OPS
def test_any_tiling_gives_the_same(op, monkeypatch, x64):
  arrays = make_arrays(op, 37)
  options = SETTINGS[op] | dict(q_segment_ids=documents(37))
  expected = with_gradients(
    op, arrays, 'float64', **options, implementation='reference'
  )
  # Many groups of tiles, and of queries that choose.
  monkeypatch.setattr(tiles, 'TILE', (1, 3))
  monkeypatch.setattr(tiles, 'SCORES_TOGETHER', 100)
  monkeypatch.setattr(blockwise, 'SCORES_TOGETHER', 100)
  monkeypatch.setattr(blockwise, 'LEAST_QUERIES', 5)
  assert_close(with_gradients(op, arrays, 'float32', **options), expected)


@OPS
@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
def test_memory_is_linear_in_the_length(op, packed):
  def temp_bytes(T):
    arrays = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
      make_arrays(op, T, N=2, K=1, block=16),
    )
    options = dict(block_size=16)
    options |= dict(top_k=4) if op is moba else dict(top_n=6, stride=8)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def loss(arrays, ids):
      options['q_segment_ids'] = ids if packed else None
      return sum(x.sum() for x in jax.tree.leaves(op(**arrays, **options)))

    compiled = jax.jit(jax.grad(loss), compiler_options=FAST)
    memory = compiled.lower(arrays, ids).compile().memory_analysis()
    return memory.temp_size_in_bytes

  short, long = temp_bytes(1024), temp_bytes(4096)
  assert long < 4.2 * short
  # A score of each head for each pair.
  assert long < B * 2 * 4096**2 * 4 / 4


@pytest.mark.parametrize(
  ('op', 'changes', 'message'),
  [
    (moba, dict(block_size=0), 'block_size=0'),
    (moba, dict(top_k=0), 'top_k=0'),
    (moba, dict(implementation='cuda'), 'cuda'),
    (moba, dict(q_segment_ids=np.zeros((B, 3), int)), 'length=5'),
    (nsa, dict(stride=3), 'stride=3'),
    (nsa, dict(top_n=1), 'top_n=1'),
    (nsa, dict(num_local=0), 'num_local=0'),
    (
      nsa,
      dict(compress_v=Compression(*map(np.zeros, ((4, 4), (4, 4, 2), (2, 4))))),
      'compress_v',
    ),
  ],
)
def test_what_does_not_fit_is_refused(op, changes, message):
  arrays = jax.tree.map(jnp.asarray, make_arrays(op, 5))
  changes = jax.tree.map(
    lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, changes
  )
  with pytest.raises(ValueError, match=message):
    op(**arrays | SETTINGS[op] | changes)


@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    (dict(k_positions=jnp.arange(9)), ValueError, 'leave out k_positions'),
    (dict(implementation='reference'), NotImplementedError, 'give none'),
  ],
)
def test_summaries_that_do_not_fit_the_call_are_refused(
  options, error, message
):
  arrays = {n: jnp.asarray(x) for n, x in make_arrays(moba, 9).items()}
  summaries = (jnp.zeros((B, 2, 2, H)),)
  with pytest.raises(error, match=message):
    moba(**arrays, block_size=4, top_k=2, summaries=summaries, **options)
