"""Choosing among keys that lie on other devices changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.block_selection import moba, nsa
from longctx.parallel import with_gathered_kv
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.mesh import make_mesh
from tests.ops.test_block_selection import (
  FAST,
  SETTINGS,
  SLOPES,
  assert_close,
  documents,
  make_arrays,
)

# An odd length, which every layout pads.
T = 37

# In the order of the op's arguments.
TOKENS = {
  moba: ('q', 'k', 'v'),
  nsa: ('q', 'k_compressed', 'v_compressed', 'k_selected', 'v_selected'),
}
BOTH = ('seq', 'model')


def case(op, layout, axis='seq', *, queries=T, given=(), **axes):
  name = [op.__name__, *(f'{x}{n}' for x, n in axes.items()), layout]
  name += [f'Q{queries}'] * (queries != T) + list(given)
  return pytest.param(op, layout, axis, axes, queries, given, id='-'.join(name))


@pytest.mark.parametrize(
  ('op', 'layout', 'axis', 'axes', 'queries', 'given'),
  [
    case(moba, 'contiguous', seq=8, given=('packed',)),
    case(moba, 'zigzag', seq=4, given=('alibi', 'dropout')),
    case(moba, 'striped', data=2, seq=2, model=2, given=('packed', 'dropout')),
    case(moba, 'zigzag', seq=4, model=2, queries=5, given=('packed', 'alibi')),
    case(nsa, 'zigzag', seq=8),
    case(nsa, 'striped', data=2, seq=2, model=2, given=('packed', 'positions')),
    case(nsa, 'contiguous', BOTH, seq=4, model=2, queries=5, given=('packed',)),
  ],
)
def test_many_devices_equal_one(op, layout, axis, axes, queries, given):
  mesh = make_mesh(**axes)
  shards = axes['seq'] * (axes['model'] if axis == BOTH else 1)
  layout = SequenceLayout(layout, T, shards)
  arrays = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), make_arrays(op, T)
  )
  options, per_head, indices = dict(SETTINGS[op]), {}, {}
  if 'packed' in given:
    indices = dict.fromkeys(('q_segment_ids', 'k_segment_ids'), documents(T))
  if 'positions' in given:
    order = jnp.asarray(np.random.default_rng(0).permutation(T))
    indices |= dict.fromkeys(('q_positions', 'k_positions'), order[None])
  if 'alibi' in given:
    per_head['alibi_slopes'] = SLOPES
  if 'dropout' in given:
    options['dropout'] = (0.3, jax.random.key(1))
  replicated = queries != T
  if replicated:
    read = jnp.asarray(np.random.default_rng(1).permutation(T)[:queries])
    indices.setdefault('q_positions', jnp.arange(T)[None])
    arrays['q'] = arrays['q'][:, read]
    for name in ('q_positions', 'q_segment_ids'):
      if name in indices:
        indices[name] = indices[name][:, read]

  def on_one(arrays):
    return op(**arrays, **options, **per_head, **indices, return_lse=True)

  def place(name, x):
    if replicated and name.startswith('q'):
      return x
    return layout.apply(x, fill=9 if 'segment' in name else 0)

  def on_many(arrays):
    shared = {n: x for n, x in arrays.items() if n not in TOKENS[op]}
    placed = [place(name, arrays[name]) for name in TOKENS[op]]
    results = with_gathered_kv(
      op,
      *placed,
      mesh=mesh,
      axis=axis,
      layout=layout,
      per_head=per_head,
      shared=shared,
      return_lse=True,
      **{name: place(name, x) for name, x in indices.items()},
      **options,
    )
    return results if replicated else jax.tree.map(layout.restore, results)

  @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
  def run(f, arrays):
    results, vjp = jax.vjp(f, arrays)
    bars = jax.tree.map(
      lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
      results,
    )
    return results, vjp(bars)[0]

  assert_close(run(on_many, arrays), run(on_one, arrays))
