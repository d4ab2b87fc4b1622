"""Conformance of attention variants: one check for each capability.

A check raises where the capability is missing, NotImplementedError where the
layer refuses. All build the same small layer, whose parameters are all moved
away from zero so that no path hides, and compile as few programs as they can.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import parallel
from longctx.analysis import leak_probe, probes
from longctx.attention import (
  VARIANTS,
  AttentionConfig,
  make_attention,
)
from longctx.attention.cache_spec import empty_cache
from longctx.masks import Causal, SlidingWindow
from longctx.models import TransformerConfig, make_model
from longctx.ops.target import Target, compiling_for
from longctx.parallel import Placement
from longctx.parallel.axes import make_axes
from longctx.parallel.layout import SequenceLayout
from tests.tiny import tiny_layer
from tests.tolerances import tolerance

# An odd length, a multiple of no block, and documents that end inside of one.
B, T, D = 2, 13, 8
SEGMENTS = np.array([[4] * 5 + [1] + [7] * 7, [0] * 13])

# Compiling is nearly all of the time, and these programs are small.
FAST = {'xla_backend_optimization_level': 0}

# Meshes, schemes and layouts, each program of which shows several cells.
RING = (dict(seq=4, model=2), 'ring', 'contiguous')
BOTH = (dict(data=2, seq=2, model=2), 'ring+ulysses', 'zigzag')
ULYSSES = (dict(data=2, seq=4), 'ulysses', 'contiguous')
GATHERED = (dict(data=2, seq=4), 'all_gather', 'striped')

MESHES = {
  'ring': RING,
  'ulysses': ULYSSES,
  'all_gather': GATHERED,
  'ring+ulysses': BOTH,
  'contiguous': RING,
  'zigzag': BOTH,
  'striped': GATHERED,
  'model': RING,
}
# A recurrence is scanned alike, whatever the scheme of softmax is, and has no
# striped layout.
MESHES_OF_RECURRENCES = {**MESHES, 'ulysses': RING, 'all_gather': RING}


def has(variant: str, capability: str) -> bool:
  return capability not in VARIANTS[variant].unsupported


def usual_encoding(variant: str) -> str:
  return 'rope' if has(variant, 'rope') else 'none'


@functools.cache
def make_layer(
  variant: str,
  *,
  gqa: bool | None = None,
  position_encoding: str | None = None,
  short_conv: int = 0,
  dropout: float = 0.0,
  dtype: str = 'float32',
  implementation: str | None = None,
  options: tuple = (),
):
  """(graph, params) of a small layer with what the variant can do.

  The parameters of all dtypes are the same numbers, those of bfloat16.
  """
  gqa = has(variant, 'gqa') if gqa is None else gqa
  position_encoding = position_encoding or usual_encoding(variant)
  param_dtype = 'float64' if dtype == 'float64' else 'float32'
  config = AttentionConfig(
    d_model=D,
    num_heads=4,
    num_kv_heads=2 if gqa else 4,
    head_dim=4,
    value_dim=4,
    position_encoding=position_encoding,
    short_conv=short_conv,
    attention_dropout=dropout,
    dtype=dtype,
    param_dtype=param_dtype,
    implementation=implementation,
    **dict(options),
  )
  layer = make_attention(tiny_layer(variant), config, rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer, nnx.Param)
  params = nnx.to_pure_dict(params)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  moved = [
    _rounded(np.ones(x.shape) * 0.05 + 0.5 * rng.normal(size=x.shape), x.dtype)
    for x in leaves
  ]
  return graph, jax.tree.unflatten(tree, moved)


# By capability, of pretrained models' blocks.
OF_BLOCKS = {
  'qk_norm': dict(
    qk_norm='head',
    qkv_bias=True,
    out_bias=True,
    rotary_dim=2,
    rope_scaling='yarn(factor=4.0, original_context=4)',
  ),
  'scale': dict(attention_scale=0.4),
  'soft_cap': dict(attention_soft_cap=3.0),
}


def everything(variant: str) -> dict:
  """Settings of a layer with all that the variant can have at once."""
  options = {}
  for capability, of_block in OF_BLOCKS.items():
    options |= of_block if has(variant, capability) else {}
  settings = {'options': tuple(options.items())}
  if has(variant, 'short_conv'):
    settings['short_conv'] = 3
  return settings


def _rounded(x, dtype):
  return jnp.asarray(jnp.asarray(x, jnp.bfloat16), dtype)


def make_input(T: int = T, dtype: str = 'float32'):
  x = np.random.default_rng(1).normal(size=(B, T, D))
  return _rounded(x, dtype)


def apply(graph, params, x, **options):
  if 'dropout_seed' in options:
    options['dropout_key'] = jax.random.key(options.pop('dropout_seed'))
  return nnx.merge(graph, params)(x, **options)


def with_gradients(graph):
  """(params, x, options) -> [out, gradients of x and of each parameter]."""

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, x, options):
    out, vjp = jax.vjp(lambda p, x: apply(graph, p, x, **options), params, x)
    # Any cotangent that is not the same everywhere.
    bar = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype)
    dparams, dx = vjp(bar)
    return [out, dx, *jax.tree.leaves(dparams)]

  return run


@functools.cache
def program(variant: str, **settings):
  graph, params = make_layer(variant, **settings)
  return functools.partial(with_gradients(graph), params)


@functools.cache
def oracle(variant: str, T: int = T, packed: bool = False, **settings):
  """The equation in float64, step by step or with every score held."""
  with jax.enable_x64(True):
    options = {'segment_ids': jnp.asarray(SEGMENTS)} if packed else {}
    if settings.get('dropout'):
      options['dropout_seed'] = 3
    run = program(
      variant, dtype='float64', implementation='reference', **settings
    )
    return [np.asarray(y) for y in run(make_input(T, 'float64'), options)]


def assert_close(actual, expected, dtype: str = 'float32'):
  """Compares arrays, errors in units of the largest entry if above 1."""
  assert len(actual) == len(expected)
  # A layer is a chain of projections, mixing, norms and gates, where the table
  # is for one sum: four times as much.
  bounds = {name: 4 * bound for name, bound in tolerance(dtype).items()}
  for x, y in zip(actual, expected, strict=True):
    assert x.shape == y.shape
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = max(1.0, np.abs(y).max(initial=0))
    np.testing.assert_allclose(x / size, y / size, **bounds)


def check_float32(variant: str):
  actual = program(variant)(make_input(), {})
  assert all(y.dtype == jnp.float32 for y in actual)
  assert_close(actual, oracle(variant))


def check_short(variant: str):
  assert_close(program(variant)(make_input(3), {}), oracle(variant, 3))


def check_bfloat16(variant: str):
  out, dx, *_ = program(variant, dtype='bfloat16')(
    make_input(dtype='bfloat16'), {}
  )
  assert out.dtype == dx.dtype == jnp.bfloat16
  for actual, expected in zip((out, dx), oracle(variant)[:2], strict=True):
    # Several layers of rounding, between projections, mixing and gates.
    error = np.asarray(actual, np.float64) - expected
    assert np.sqrt(np.mean(error**2)) < 0.04 * np.sqrt(np.mean(expected**2))


def check_causal(variant: str):
  settings = dict(short_conv=3) if has(variant, 'short_conv') else {}
  graph, params = make_layer(variant, **settings)
  layer = nnx.merge(graph, params)
  packed = has(variant, 'packing')
  segments = np.repeat([0, 1, 2], [6, 1, 6]) if packed else None
  ids = jnp.asarray(segments)[None] if packed else None
  allowed = leak_probe.allowed_pairs(layer.mask or Causal(), T, segments)
  if settings:
    taps = leak_probe.allowed_pairs(SlidingWindow(2), T, segments)
    allowed = leak_probe.reach([taps, allowed])
  assert leak_probe.leaks(allowed, np.tri(T, dtype=bool)) == []
  fn = lambda x: layer(x, segment_ids=ids)
  x = jax.random.normal(jax.random.key(2), (1, T, D))
  read = leak_probe.reads(fn, x)
  assert leak_probe.leaks(read, allowed) == []
  assert leak_probe.unread(read, allowed) == [] or layer.mask_is_bound
  changed = leak_probe.changes(fn, x)
  assert leak_probe.leaks(changed, allowed) == []
  assert changed.diagonal().all()


def check_eager(variant: str):
  graph, params = make_layer(variant)
  out = apply(graph, params, make_input())
  assert_close([out], oracle(variant)[:1])


def check_extremes(variant: str):
  # The inputs of the projections are what reaches the logits squared.
  for y in program(variant)(100 * make_input(), {}):
    assert np.isfinite(y).all()
  for y in program(variant)(1e4 * make_input(), {}):
    assert np.isfinite(y).all()


def check_second_derivative(variant: str):
  def product(dtype, implementation):
    graph, params = make_layer(
      variant, dtype=dtype, implementation=implementation
    )
    x = make_input(5, dtype)

    def loss(x):
      return jnp.sum(jnp.sin(apply(graph, params, x)))

    run = lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1]
    return jax.jit(run, compiler_options=FAST)(x, jnp.cos(x))

  with jax.enable_x64(True):
    expected = np.asarray(product('float64', 'reference'))
  assert_close([product('float32', None)], [expected])


def check_query_indices(variant: str):
  places = jnp.array([[12, 0, -1], [3, 4, 7]])
  out = program(variant)(make_input(), {'query_indices': places})[0]
  expected = oracle(variant)[0]
  assert_close(
    [out[0, :2], out[1]], [expected[0, [12, 0]], expected[1, 3:8][[0, 1, 4]]]
  )


def check_decode(variant: str, *, mesh: tuple[int, int, int] | None = None):
  """Chunks and single tokens, of which rows read different numbers."""
  axes = None
  if mesh is not None:
    axes = make_axes(parallel.make_mesh(*mesh), 'seq')
  settings = everything(variant)
  graph, params = make_layer(variant, **settings)
  layer = nnx.merge(graph, params)
  spec = layer.cache_spec(T, shards=axes.size(axes.seq) if axes else 1)
  kept = sum(entry.nbytes() for entry in spec)
  if mesh is None:
    assert kept == layer.state_bytes(T, 'float32')
  else:
    assert kept >= layer.state_bytes(T, 'float32')

  @functools.partial(jax.jit, compiler_options=FAST)
  def extend(x, cache, lengths, valid):
    return layer.apply_with_cache(
      x, spec=spec, cache=cache, lengths=lengths, valid=valid, axes=axes
    )

  x, out = np.asarray(make_input()), np.full((B, T, D), np.nan)
  cache, lengths = empty_cache(spec, B, axes), np.zeros(B, int)
  for counts in ([5, 2], [3, 5], [0, 1], [2, 5], [1, 0], [1, 0], [1, 0]):
    width = 5 if max(counts) > 1 else 1
    valid = np.arange(width) < np.array(counts)[:, None]
    # What is not a row's own is never to be seen.
    tokens = np.full((B, width, D), 7, x.dtype)
    rows, columns = np.nonzero(valid)
    tokens[valid] = x[rows, lengths[rows] + columns]
    y, cache = extend(tokens, cache, jnp.asarray(lengths), jnp.asarray(valid))
    out[rows, lengths[rows] + columns] = y[valid]
    lengths = lengths + counts
  assert (lengths == T).all()
  assert_close([out], oracle(variant, **settings)[:1])


def check_gqa(variant: str):
  make_layer(variant, gqa=True)
  if has(variant, 'gqa'):
    assert_close(
      program(variant, gqa=False)(make_input(), {}), oracle(variant, gqa=False)
    )


def check_position_encoding(variant: str, *, position_encoding: str):
  settings = {'position_encoding': position_encoding}
  if position_encoding == usual_encoding(variant):
    # Of the programs that are there already; a layer without them refuses.
    make_layer(variant, **settings)
    settings = {}
  run = program(variant, **settings)
  assert_close(run(make_input(), {}), oracle(variant, **settings))


def check_dropout(variant: str):
  run = program(variant, dropout=0.3)
  actual = run(make_input(), {'dropout_seed': 3})
  assert_close(actual, oracle(variant, dropout=0.3))
  kept = run(make_input(), {})
  assert not np.allclose(actual[0], kept[0])


def check_everything(variant: str, *, capability: str):
  if capability in OF_BLOCKS:
    make_layer(variant, options=tuple(OF_BLOCKS[capability].items()))
  else:
    make_layer(variant, short_conv=3)
  settings = everything(variant)
  run = program(variant, **settings)
  assert_close(run(make_input(), {}), oracle(variant, **settings))


def check_analysis(variant: str):
  """Outputs are sums of values by the attention that probes find."""
  graph, params = make_layer(variant)

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, x):
    layer, context = nnx.merge(graph, params), probes.ProbeContext()
    found = probes.weighted_sums(layer, x, jnp.eye(T)[None], context)
    qkv = layer.project(x, context)
    out = layer.attend(qkv, context)
    v = qkv.v.reshape(B, T, -1, out.shape[-1])
    v = jnp.repeat(v, out.shape[2] // v.shape[2], axis=2)
    return found, jnp.einsum('BTNS,BSNV->BTNV', found, v), out

  found, summed, out = run(params, make_input())
  assert_close([summed], [out])
  layer = nnx.merge(graph, params)
  mask = Causal() if layer.recurrence else layer.mask
  allowed = leak_probe.allowed_pairs(mask, T)
  assert not found.swapaxes(2, 3)[:, ~allowed].any()


def check_packing(variant: str):
  run = program(variant)
  x, ids = make_input(), jnp.asarray(SEGMENTS)
  packed = run(x, {'segment_ids': ids})
  assert_close([packed[0]], [separately(lambda x: run(x, {})[0], x)])
  assert_close(packed, oracle(variant, packed=True))
  # The position table is the model's, which is no longer than a document.
  model = learned_model(variant)
  tokens = jnp.asarray(np.random.default_rng(2).integers(0, D, (B, T)))
  assert_close(
    [model(tokens, {'segment_ids': ids})],
    [separately(lambda tokens: model(tokens, {}), tokens)],
  )


def separately(run, x):
  """What `run` makes of every document alone, side by side.

  A document alone is the beginning of a row, whatever comes after it, which
  nothing reads: see `check_causal`. So that one program serves all lengths.
  """
  parts = [
    run(jnp.roll(x, -begin, axis=1))[:1, :length]
    for begin, length in ((0, 5), (5, 1), (6, 7))
  ]
  return np.concatenate([np.concatenate(parts, axis=1), run(x)[1:]])


def learned_model(variant: str):
  """(tokens, options) -> logits of a layer with learned positions."""
  config = TransformerConfig(
    vocab_size=D,
    d_model=D,
    num_heads=4,
    layers=(tiny_layer(variant),),
    mlp_dim=0,
    position_encoding='learned',
    max_positions=T,
  )
  model = make_model(config, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model, nnx.Param)
  run = functools.partial(apply, graph, params)
  return jax.jit(
    lambda tokens, options: run(tokens, **options), compiler_options=FAST
  )


def check_mesh(variant: str, *, capability: str):
  """All at once: packed documents, grouped heads, dropout, a convolution."""
  expected = on_mesh(variant, None)
  meshes = MESHES
  if not has(variant, 'striped'):
    meshes = MESHES_OF_RECURRENCES
  axes, scheme, layout = meshes[capability]
  assert_close(
    on_mesh(variant, (tuple(axes.items()), scheme, layout)), expected
  )


@functools.cache
def on_mesh(variant: str, place: tuple | None):
  settings = everything(variant)
  if has(variant, 'dropout'):
    settings['dropout'] = 0.3
  graph, params = make_layer(variant, **settings)
  x, ids, bar = make_input(), SEGMENTS, make_input() ** 2
  placement = None
  if place is not None:
    axes, scheme, name = place
    mesh = parallel.make_mesh(**dict(axes))
    shards = int(
      np.prod([mesh.shape[a] for a in parallel.sequence_axes(scheme)])
    )
    placement = Placement(mesh, SequenceLayout(name, T, shards), scheme)
    # The length of all arrays is that of the layout, padding included.
    layout = placement.layout
    x, bar = layout.apply(x), layout.apply(bar)
    ids = layout.apply(ids, fill=9)

  options = {}
  if has(variant, 'packing'):
    options['segment_ids'] = jnp.asarray(ids)

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, x, bar):
    def call(params, x):
      key = jax.random.key(3) if 'dropout' in settings else None
      layer = nnx.merge(graph, params)
      return layer(x, placement=placement, dropout_key=key, **options)

    out, vjp = jax.vjp(call, params, x)
    return out, *vjp(bar)

  if placement is not None:
    x, bar = (jax.device_put(y, placement.sharding) for y in (x, bar))
  out, dparams, dx = run(params, x, bar)
  if placement is not None:
    out, dx = (placement.layout.restore(y) for y in (out, dx))
  return [np.asarray(y) for y in (out, dx, *jax.tree.leaves(dparams))]


def check_pallas(variant: str):
  graph, params = make_layer(variant, implementation='pallas')
  x = make_input()
  # Interpreted; the gradients of the kernels are tested with the ops.
  run = jax.jit(functools.partial(apply, graph), compiler_options=FAST)
  assert_close([run(params, x)], oracle(variant)[:1])

  def loss(params, x):
    return apply(graph, params, x).sum()

  with compiling_for(Target('tpu', 'TPU v5')):
    program = str(jax.make_jaxpr(jax.grad(loss))(params, x))
  # One forward, and one or two backward.
  assert program.count('pallas_call[') >= 2


CHECKS = {
  'float32': check_float32,
  'bfloat16': check_bfloat16,
  'short': check_short,
  'causal': check_causal,
  'eager': check_eager,
  'extremes': check_extremes,
  'second_derivative': check_second_derivative,
  'query_indices': check_query_indices,
  'decode': check_decode,
  'sharded_decode': functools.partial(check_decode, mesh=(2, 2, 2)),
  'gqa': check_gqa,
  'rope': functools.partial(check_position_encoding, position_encoding='rope'),
  'alibi': functools.partial(
    check_position_encoding, position_encoding='alibi'
  ),
  **{
    name: functools.partial(check_everything, capability=name)
    for name in OF_BLOCKS
  },
  'dropout': check_dropout,
  'short_conv': functools.partial(check_everything, capability='short_conv'),
  'analysis': check_analysis,
  'packing': check_packing,
  **{name: functools.partial(check_mesh, capability=name) for name in MESHES},
  'pallas': check_pallas,
}


_variants = set()


def forget_all_but(variant: str):
  """Frees what the checks of other variants have compiled.

  Not the small programs that all variants share.
  """
  if _variants - {variant}:
    for cached in (make_layer, program, oracle, on_mesh):
      cached.cache_clear()
    _variants.clear()
  _variants.add(variant)
