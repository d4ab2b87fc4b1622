"""The short convolution on several devices equals that on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.costs.hlo import collective_bytes
from longctx.ops.short_conv import short_conv as local
from longctx.parallel import halo
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.mesh import make_mesh
from tests.tolerances import tolerance

B, D = 2, 6
BOTH = ('seq', 'model')


def make_inputs(T, W):
  rng = np.random.default_rng(T)
  return (
    jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
    jnp.asarray(rng.normal(size=(W, D)), jnp.float32),
  )


def make_segments(layout):
  """A row that changes where runs begin, and one where they do not.

  The second has documents shorter than the kernel, and an id that comes back.
  """
  T, C = layout.seq_len, layout.span_len
  ids = np.zeros((B, T), np.int32)
  for i, begin in enumerate((C, 2 * C, 4 * C)):
    ids[0, begin:] = i + 1
  ids[1, [2, 3, 7]] = ids[1, T // 2 :: 5] = 1
  return jnp.asarray(ids)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, x, kernel, segment_ids):
  """out and the gradients of a fixed random sum of it."""
  out, vjp = jax.vjp(
    lambda x, kernel: f(x, kernel, segment_ids=segment_ids), x, kernel
  )
  seed = np.random.default_rng(0).normal(size=out.shape)
  return out, vjp(jnp.asarray(seed, out.dtype))


def case(layout, T, W, axis='seq', *, packed=False, **axes):
  name = [f'{x}{size}' for x, size in axes.items()]
  name += [layout, f'T{T}-W{W}'] + ['packed'] * packed
  return pytest.param(layout, T, W, axis, packed, axes, id='-'.join(name))


@pytest.mark.parametrize(
  ('layout', 'T', 'W', 'axis', 'packed', 'axes'),
  [
    case('contiguous', 37, 4, seq=1, packed=True),
    case('contiguous', 37, 4, seq=3, packed=True),
    case('contiguous', 37, 4, seq=8),
    case('contiguous', 37, 1, seq=8),
    # Runs as long as what the kernel reads back, and shards of padding only.
    case('contiguous', 20, 4, seq=8, packed=True),
    case('zigzag', 37, 4, seq=1),
    case('zigzag', 37, 4, seq=2, packed=True),
    case('zigzag', 37, 3, seq=8, packed=True),
    case('striped', 37, 4, seq=8, packed=True),
    case('striped', 37, 3, seq=3),
    # Taps that go round the ring more than once.
    case('striped', 37, 8, seq=3, packed=True),
    case('striped', 9, 12, seq=2, packed=True),
    case('striped', 37, 4, seq=1, packed=True),
    case('zigzag', 37, 4, data=2, seq=2, model=2, packed=True),
    case('contiguous', 37, 4, BOTH, seq=2, model=4, packed=True),
    case('striped', 37, 4, BOTH, data=2, seq=2, model=2, packed=True),
  ],
)
def test_shards_equal_one_device(layout, T, W, axis, packed, axes):
  mesh = make_mesh(**axes)
  shards = mesh.size // axes.get('data', 1)
  shards = shards if axis == BOTH else axes['seq']
  layout = SequenceLayout(layout, T, shards)
  inputs = make_inputs(T, W)
  segment_ids = make_segments(layout) if packed else None
  result = value_and_gradients(
    functools.partial(
      halo.short_conv, mesh=mesh, axis=axis, layout=layout.name
    ),
    *inputs,
    segment_ids,
  )
  expected = value_and_gradients(
    lambda *args, **kwargs: local(*args, **kwargs)[0], *inputs, segment_ids
  )
  for x, y in zip(
    jax.tree.leaves(result), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(x, y, **tolerance('float32'))


@pytest.mark.parametrize('name', ['contiguous', 'zigzag', 'striped'])
def test_arrays_in_the_layout_stay_there(name):
  layout = SequenceLayout(name, 37, 4)
  x, kernel = make_inputs(37, 4)
  segment_ids = make_segments(layout)
  placed = jax.jit(
    functools.partial(
      halo.short_conv, mesh=make_mesh(seq=4), layout=layout, in_layout=True
    )
  )(
    layout.apply(x.astype(jnp.bfloat16), fill=-3.0),
    kernel,
    segment_ids=layout.apply(segment_ids, fill=-1.0),
  )
  assert placed.dtype == jnp.bfloat16
  expected, _ = local(x.astype(jnp.bfloat16), kernel, segment_ids=segment_ids)
  np.testing.assert_array_equal(
    layout.restore(placed).astype(jnp.float32), expected.astype(jnp.float32)
  )


@pytest.mark.parametrize(
  ('layout', 'expected'),
  [
    # The W - 1 tokens before each run but the first.
    ('contiguous', 7 * 3 * B * D * 4),
    ('zigzag', 2 * 7 * 3 * B * D * 4),
    # Every shard, W - 1 times.
    ('striped', 3 * 96 * B * D * 4),
  ],
)
def test_bytes_on_the_wire_are_those_of_the_docstring(layout, expected):
  run = jax.jit(
    functools.partial(
      halo.short_conv, mesh=make_mesh(seq=8), layout=layout, in_layout=True
    )
  )
  compiled = run.lower(*make_inputs(96, 4)).compile()
  counted = collective_bytes(compiled.as_text())
  assert {kind: size for kind, size in counted.items() if size} == {
    'collective-permute': expected
  }


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(T=8, layout='contiguous'), 'fewer shards, or striped'),
    (dict(T=16, layout='zigzag'), 'spans of 2 tokens, .* reads 3 tokens back'),
    (dict(D=5), 'channels=5 must be a multiple of the mesh axis model=2'),
  ],
)
def test_wrong_call_says_what_to_change(change, message):
  call = dict(T=32, D=6) | change
  T, D = call.pop('T'), call.pop('D')
  with pytest.raises(ValueError, match=message):
    halo.short_conv(
      jnp.zeros((2, T, D)),
      jnp.zeros((4, D)),
      mesh=make_mesh(seq=4, model=2),
      **call,
    )
