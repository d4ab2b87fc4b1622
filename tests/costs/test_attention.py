"""What a ring is said to compute and send is what it computes and sends."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import parallel
from longctx.costs.attention import hop_blocks, wire_bytes
from longctx.costs.hlo import collective_bytes
from longctx.masks import (
  Beyond,
  Causal,
  Full,
  GlobalTokens,
  PrefixColumns,
  PrefixRows,
  SlidingWindow,
)
from longctx.ops.dot_product_attention import BlockSizes, xla_blocks
from longctx.parallel.layout import LAYOUTS, SequenceLayout
from longctx.parallel.mesh import make_mesh

B, N, K, H, V = 2, 8, 2, 4, 6

MASKS = {
  'causal': Causal(),
  'full': Full(),
  'window': SlidingWindow(9),
  'wide': SlidingWindow(29),
  'sinks': Causal() & PrefixColumns(3) | SlidingWindow(9),
  'longformer': SlidingWindow(4, 4) | GlobalTokens(3),
  'rows': Causal() & PrefixRows(3) | SlidingWindow(4) & Beyond(3, 0),
}

# Compiling is nearly all of the time; what is sent does not depend on it.
FAST = {'xla_backend_optimization_level': 0}


def programs(
  scheme,
  layout,
  mesh,
  axis,
  *,
  backward,
  together=False,
  dims=(B, N, K, H, V),
  uses_lse=False,
  packed=False,
  **options,
):
  """Attention, compiled for arrays that lie on the mesh in their layout.

  The passes are programs of their own, as where a loop runs over the layers: in
  one program (`together`), XLA keeps what the first hop brought forward and
  does not send it again backward.
  """
  B, N, K, H, V = dims
  L = layout.padded_len
  sharding = NamedSharding(mesh, P(None, axis))

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  arrays = [array(B, L, n, d) for n, d in ((N, H), (K, H), (K, V), (N, V))]
  bars = (arrays.pop(), array(B, L, N)) if uses_lse else arrays.pop()
  indices = dict(options)
  if packed:
    indices['q_segment_ids'] = array(B, L, dtype=jnp.int32)
  for name in ('q_positions', 'k_positions'):
    if name in indices:
      indices[name] = jax.ShapeDtypeStruct(indices[name], jnp.int32)
  static = {n: indices.pop(n) for n in ('mask',) if n in indices}

  def attend(q, k, v, indices):
    return parallel.dot_product_attention(
      q,
      k,
      v,
      mesh=mesh,
      axis=axis,
      scheme=scheme,
      layout=layout,
      in_layout=True,
      return_lse=uses_lse,
      **static,
      **indices,
    )

  def forward(q, k, v, indices):
    return jax.vjp(lambda *x: attend(*x, indices), q, k, v)

  if together:

    def both(q, k, v, bars, indices):
      out, vjp = forward(q, k, v, indices)
      return out, vjp(bars)

    lowered = [jax.jit(both).lower(*arrays, bars, indices)]
  elif backward:
    _, vjp = jax.eval_shape(forward, *arrays, indices)
    lowered = [
      jax.jit(forward).lower(*arrays, indices),
      jax.jit(lambda vjp, bars: vjp(bars)).lower(vjp, bars),
    ]
  else:
    lowered = [jax.jit(attend).lower(*arrays, indices)]
  return [x.compile(compiler_options=FAST) for x in lowered]


def check_bytes(
  scheme, layout, axes, axis, *, dims=(B, N, K, H, V), **settings
):
  mesh = make_mesh(**axes)
  counted = Counter()
  for compiled in programs(scheme, layout, mesh, axis, dims=dims, **settings):
    counted.update(collective_bytes(compiled.as_text()))
  B, N, K, H, V = dims
  formula = wire_bytes(
    scheme, B, N, K, H, V=V, mesh=mesh, axis=axis, layout=layout, **settings
  )
  assert {kind: size for kind, size in counted.items() if size} == formula
  return formula


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('case', [*MASKS, 'packed'])
def test_bytes_of_a_ring_are_those_of_the_formula(case, name):
  settings = dict(packed=True) if case == 'packed' else dict(mask=MASKS[case])
  layout = SequenceLayout(name, 67, 8)
  check_bytes('ring', layout, dict(seq=8), 'seq', backward=True, **settings)


@pytest.mark.parametrize(
  ('scheme', 'axes', 'axis', 'settings'),
  [
    ('ring', dict(seq=8), 'seq', dict(mask=MASKS['longformer'])),
    ('ring', dict(seq=8), 'seq', dict(packed=True, mask=MASKS['sinks'])),
    (
      'ring',
      dict(seq=4),
      'seq',
      dict(backward=True, k_positions=(48,), mask=MASKS['window']),
    ),
    (
      'ring',
      dict(seq=2),
      'seq',
      dict(backward=True, q_positions=(2, 48), k_positions=(2, 48)),
    ),
    (
      'ring',
      dict(data=2, seq=2, model=2),
      'seq',
      dict(backward=True, packed=True, mask=MASKS['longformer']),
    ),
    ('ring', dict(seq=1), 'seq', dict(backward=True)),
    ('ulysses', dict(seq=8), 'seq', dict()),
    ('ulysses', dict(seq=8), 'seq', dict(backward=True)),
    (
      'ulysses',
      dict(data=2, seq=2, model=2),
      'seq',
      dict(backward=True, packed=True, uses_lse=True),
    ),
    ('ulysses', dict(seq=2), 'seq', dict(q_positions=(48,))),
    ('all_gather', dict(seq=8), 'seq', dict(packed=True)),
    ('all_gather', dict(seq=8), 'seq', dict(backward=True)),
    (
      'all_gather',
      dict(seq=2, model=4),
      ('seq', 'model'),
      dict(backward=True, k_positions=(2, 48)),
    ),
    (
      'all_gather',
      dict(data=2, seq=2, model=2),
      'seq',
      dict(backward=True, packed=True),
    ),
    (
      'ring+ulysses',
      dict(seq=4, model=2),
      ('seq', 'model'),
      dict(backward=True, mask=MASKS['longformer']),
    ),
    (
      'ring+ulysses',
      dict(seq=4, model=2),
      ('seq', 'model'),
      dict(backward=True, packed=True, mask=MASKS['sinks']),
    ),
    (
      'ring+ulysses',
      dict(data=2, seq=2, model=2),
      ('seq', 'model'),
      dict(backward=True, q_positions=(2, 48), uses_lse=True),
    ),
  ],
)
def test_bytes_of_a_scheme_are_those_of_the_formula(
  scheme, axes, axis, settings
):
  seq = [axis] if isinstance(axis, str) else axis
  shards = int(np.prod([axes[name] for name in seq]))
  # Positions, where there are any, are given for a length without padding.
  positions = settings.keys() & {'q_positions', 'k_positions'}
  layout = SequenceLayout('zigzag', 48 if positions else 67, shards)
  assert not positions or not layout.is_padded
  check_bytes(scheme, layout, axes, axis, **(dict(backward=False) | settings))


@pytest.mark.parametrize('name', ['contiguous', 'zigzag'])
@pytest.mark.parametrize('backward', [False, True])
def test_a_window_sends_a_seventh_of_the_full_ring(name, backward):
  layout = SequenceLayout(name, 65_536, 8)
  sent = []
  for mask in (Causal(), SlidingWindow(1023)):
    sent.append(
      check_bytes(
        'ring',
        layout,
        dict(seq=8),
        'seq',
        dims=(1, 2, 2, 8, 8),
        mask=mask,
        backward=backward,
      )
    )
  full, window = (sum(kinds.values()) for kinds in sent)
  assert 7 * window <= full


def test_peak_bytes_do_not_grow_with_the_devices():
  peaks = []
  # With 2 or 3 devices the loop over hops is unrolled, and ends up elsewhere.
  for R in (4, 6, 8):
    (compiled,) = programs(
      'ring',
      SequenceLayout('zigzag', 256 * R, R),
      make_mesh(seq=R),
      'seq',
      dims=(1, 4, 2, 32, 32),
      backward=True,
      together=True,
    )
    # Of one device, as all run the same program.
    memory = compiled.memory_analysis()
    peaks.append(
      memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
    )
  np.testing.assert_allclose(peaks, peaks[0], rtol=0.05)


def counted_blocks(monkeypatch, mask, layout, sizes, fold):
  """Blocks on the work lists of every device, forward and backward."""
  # Devices report at the same time, which appending can take.
  reports = []
  make_work_list = xla_blocks.make_work_list

  def counting(mask, tiling, indices, *, by_column):
    blocks = make_work_list(mask, tiling, indices, by_column=by_column)

    def report(device, blocks):
      reports.append((by_column, int(device), int(blocks)))

    jax.debug.callback(
      report, jax.lax.axis_index('seq'), (blocks.stop - blocks.start).sum()
    )
    return blocks

  monkeypatch.setattr(xla_blocks, 'make_work_list', counting)
  axes = dict(seq=8) if fold == 1 else dict(seq=8 // fold, model=fold)
  scheme, axis = (
    ('ring', 'seq') if fold == 1 else ('ring+ulysses', ('seq', 'model'))
  )
  q = jnp.ones((1, layout.padded_len, fold, 2))
  attend = functools.partial(
    parallel.dot_product_attention,
    mesh=make_mesh(**axes),
    axis=axis,
    scheme=scheme,
    layout=layout,
    in_layout=True,
    mask=mask,
    block_sizes=sizes,
  )
  jax.block_until_ready(
    jax.jit(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2)))(q, q, q)
  )
  jax.effects_barrier()
  counts = np.zeros((2, 8 // fold))
  for by_column, device, blocks in reports:
    # Devices of one place in the ring share its blocks, each for its heads.
    counts[int(by_column), device] += blocks / fold
  return counts


@pytest.mark.parametrize(
  ('name', 'case', 'fold'),
  [
    ('contiguous', 'causal', 1),
    ('zigzag', 'full', 1),
    ('zigzag', 'longformer', 1),
    ('striped', 'sinks', 1),
    ('contiguous', 'sinks', 1),
    ('zigzag', 'wide', 2),
  ],
)
def test_executed_blocks_are_those_on_the_work_lists(
  monkeypatch, name, case, fold
):
  layout = SequenceLayout(name, 155, 8)
  forward, backward = counted_blocks(
    monkeypatch, MASKS[case], layout, BlockSizes(5, 4, 5, 4), fold
  )
  predicted = hop_blocks(MASKS[case], layout, 5, 4, fold=fold).total
  np.testing.assert_array_equal(forward, predicted)
  np.testing.assert_array_equal(backward, predicted)


@pytest.mark.parametrize(
  ('name', 'imbalance'),
  [('contiguous', 1.868), ('zigzag', 1.0), ('striped', 1.0)],
)
def test_who_computes_how_much_of_a_causal_mask(name, imbalance):
  layout = SequenceLayout(name, 65_536, 8)
  blocks = hop_blocks(Causal(), layout, 512, 512).total
  assert round(blocks.max() / blocks.mean(), 3) == imbalance
  # What has to be computed, and nothing for the pairs that are masked out.
  least = 128 * 129 / 2
  assert least <= blocks.sum() <= 1.06 * least


def test_contiguous_shards_approach_twice_the_mean_less_one_over_devices():
  for R in (2, 8):
    layout = SequenceLayout('contiguous', 65_536, R)
    blocks = hop_blocks(Causal(), layout, 16, 16).total
    assert abs(blocks.max() / blocks.mean() - (2 - 1 / R)) < 1e-3


def test_a_device_of_its_own_sends_nothing_and_computes_the_lower_half():
  layout = SequenceLayout('zigzag', 64, 1)
  assert hop_blocks(Causal(), layout, 16, 16).total.tolist() == [10]
  mesh = jax.sharding.AbstractMesh((1,), ('seq',))
  sent = wire_bytes('ring', B, N, K, H, mesh=mesh, layout=layout)
  assert sent == {}


def test_a_planner_needs_no_devices():
  mesh = jax.sharding.AbstractMesh((4, 256), ('data', 'seq'))
  layout = SequenceLayout('zigzag', 2**20, 256)
  sent = wire_bytes('ring', 4, 32, 8, 128, mesh=mesh, layout=layout, itemsize=2)
  # Keys and values of all tokens, 255 times.
  assert sent == {'collective-permute': 4 * 2**20 * 255 * 2 * 8 * 128 * 2}
  with pytest.raises(ValueError, match='must divide'):
    wire_bytes('ulysses', 4, 32, 8, 128, mesh=mesh, layout=layout)
