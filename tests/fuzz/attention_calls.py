"""Random calls of attention on meshes, each against the equation in float64.

    python -m tests.fuzz.attention_calls --calls=2000

draws the op, the mesh, the scheme, the layout, the mask, positions, segments,
whether an array is an argument, a constant or made inside of the program, how
it is sharded, and whether the call is compiled. A call may be refused with a
reason; one that answers has to be right. Every failure names the call that
makes it again.
"""

import argparse
import functools
import importlib.metadata
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx import parallel
from longctx.ops.block_selection import moba
from longctx.parallel.recurrences import linear_recurrence
from tests.fuzz import equations
from tests.fuzz.draws import Draw, Refused

N, H, V = 8, 4, 3
OPS = ['attention'] * 14 + ['recurrence'] * 2 + ['short_conv'] * 2 + ['moba']
SLOPES = np.float32(2.0 ** -np.arange(1, N + 1))


def attention(d: Draw) -> dict[str, tuple[Any, Any]]:
  """(found, expected) of outputs, log-sum-exps and a slope of the gradients."""
  T, S = d.T, d.T
  replicated = d.chance(0.12)
  if replicated:
    T = d.pick([t for t in (1, 3, 6) if t != S])
    d.in_layout |= d.chance(0.5)
  k, v = d.floats(d.B, S, d.K, H), d.floats(d.B, S, d.K, V)
  q = d.floats(d.B, T, N, H)
  at = dict(q_positions=None, k_positions=None)
  ids = dict(q_segment_ids=None, k_segment_ids=None)
  if d.chance(0.5):
    at['k_positions'] = d.positions(S)
    if d.chance(0.4) and not replicated:
      del at['q_positions']
      at['q_positions'] = at['k_positions']
  if replicated or d.chance(0.3):
    at['q_positions'] = d.positions(T)
  if d.chance(0.5):
    ids['k_segment_ids'] = d.segments(S)
    same = not replicated and d.chance(0.8)
    ids['q_segment_ids'] = ids['k_segment_ids'] if same else d.segments(T)
  options = dict(
    mask=d.mask(), normalizer=d.pick(['softmax', 'softmax', 'softmax1'])
  )
  if d.chance(0.2):
    options['logits_soft_cap'] = 1.5
  if d.chance(0.2):
    options['alibi_slopes'] = SLOPES
  if d.chance(0.2):
    options['sink_logits'] = np.float32(d.rng.normal(size=N))
  d.options = options
  d.T_of_queries, d.shapes = (
    T,
    {n: None if x is None else x.shape for n, x in (at | ids).items()},
  )
  expected = functools.partial(equations.attention, **at, **ids, **options)
  is_given = at['k_positions'] is not None or at['q_positions'] is not None
  is_open = is_given and ids['k_segment_ids'] is None
  if d.in_layout and d.layout.is_padded and is_open:
    # Padding that is given positions has to be a document of its own.
    ids['k_segment_ids'] = np.zeros((d.B, S), np.int32)
    ids['q_segment_ids'] = np.zeros((d.B, T), np.int32)
  arrays = dict(q=q, k=k, v=v, **at, **ids)
  for name, x in arrays.items():
    if x is not None and (name[0] != 'q' or not replicated):
      arrays[name] = d.placed(x, 9 if 'segment' in name else 0)
  implementations = [None] * 6 + ['xla'] * 2
  if 'ring' not in d.scheme:
    implementations += ['reference']
  d.implementation = d.pick(implementations)
  slope = d.chance(0.2)
  bars = [d.rng.normal(size=x.shape) for x in (q, k, v)]
  out_bar = d.rng.normal(size=(d.B, T, N, V))

  def call(q, k, v, **indices):
    return parallel.dot_product_attention(
      q,
      k,
      v,
      scheme=d.scheme,
      implementation=d.implementation,
      return_lse=True,
      **d.where(),
      **indices,
      **options,
    )

  def both(q, k, v, **indices):
    out, lse = call(q, k, v, **indices)
    if not slope:
      return out, lse
    bar = out_bar if replicated else d.placed(out_bar)

    def loss(*qkv):
      return jnp.sum(call(*qkv, **indices)[0] * bar.astype(np.float32))

    return out, lse, *jax.grad(loss, (0, 1, 2))(q, k, v)

  out, lse, *grads = d.run(
    both, {n: x for n, x in arrays.items() if x is not None}
  )
  of_queries = (
    (lambda x: np.asarray(x, np.float64)) if replicated else d.restored
  )
  wide = [np.float64(x) for x in (q, k, v)]
  results = dict(
    zip(
      ('out', 'lse'),
      zip(map(of_queries, (out, lse)), expected(*wide), strict=True),
      strict=True,
    )
  )
  if slope:
    found = sum(
      np.sum(restored(grad) * bar)
      for grad, bar, restored in zip(
        grads, bars, (of_queries, d.restored, d.restored), strict=True
      )
    )
    ends = [
      np.sum(
        expected(*(x + h * bar for x, bar in zip(wide, bars, strict=True)))[0]
        * out_bar
      )
      for h in (1e-5, -1e-5)
    ]
    results['slope'] = found, (ends[0] - ends[1]) / 2e-5
  return results


def recurrence(d: Draw) -> dict[str, tuple[Any, Any]]:
  arrays = dict(
    q=d.floats(d.B, d.T, N, H),
    k=d.floats(d.B, d.T, d.K, H),
    v=d.floats(d.B, d.T, d.K, V),
  )
  arrays['k'] /= np.linalg.norm(arrays['k'], axis=-1, keepdims=True)
  if d.chance(0.4):
    arrays['beta'] = 1 / (1 + np.exp(-d.floats(d.B, d.T, N)))
  if d.chance(0.6):
    shape = (d.B, d.T, N) + ((H,) if d.chance(0.4) else ())
    arrays['log_decay'] = -np.exp(d.floats(*shape) - 2)
  if d.chance(0.5):
    arrays['segment_ids'] = d.segments(d.T)
  expected = equations.recurrence(**arrays)
  call = functools.partial(linear_recurrence, chunk_size=4, **d.where())
  placed = {
    n: d.placed(x, 9 if 'segment' in n else 0) for n, x in arrays.items()
  }
  d.shapes = sorted(arrays)
  out, state = d.run(call, placed)
  return {'out': (d.restored(out), expected[0]), 'state': (state, expected[1])}


def short_conv(d: Draw) -> dict[str, tuple[Any, Any]]:
  arrays = dict(x=d.floats(d.B, d.T, 8))
  kernel = np.float32(d.rng.normal(size=(d.pick([1, 2, 4]), 8)))
  if d.chance(0.5):
    arrays['segment_ids'] = d.segments(d.T)
  expected = equations.short_conv(kernel=kernel, **arrays)
  taps = jnp.asarray(kernel)
  call = functools.partial(parallel.short_conv, kernel=taps, **d.where())
  placed = {
    n: d.placed(x, 9 if 'segment' in n else 0) for n, x in arrays.items()
  }
  out = d.run(call, placed)
  return {'out': (d.restored(out), expected)}


def gathered(d: Draw) -> dict[str, tuple[Any, Any]]:
  """MoBA, whose queries choose among gathered keys."""
  d.in_layout = True
  arrays = dict(
    q=d.floats(d.B, d.T, N, H),
    k=d.floats(d.B, d.T, d.K, H),
    v=d.floats(d.B, d.T, d.K, V),
  )
  indices, options = {}, dict(block_size=4, top_k=2)
  if d.chance(0.5):
    indices |= dict.fromkeys(('q_positions', 'k_positions'), d.positions(d.T))
  if d.chance(0.5) or (indices and d.layout.is_padded):
    indices |= dict.fromkeys(
      ('q_segment_ids', 'k_segment_ids'), d.segments(d.T, returns=False)
    )
  with jax.enable_x64(True):
    expected = moba(
      **{n: jnp.asarray(x, jnp.float64) for n, x in arrays.items()},
      **indices,
      **options,
      implementation='reference',
    )
  placed = {
    n: d.placed(x, 9 if 'segment' in n else 0)
    for n, x in (arrays | indices).items()
  }

  def call(q, k, v, **indices):
    return parallel.with_gathered_kv(
      moba,
      q,
      k,
      v,
      mesh=d.mesh,
      layout=d.layout,
      axis=d.axis,
      **indices,
      **options,
    )

  return {'out': (d.restored(d.run(call, placed)), expected)}


KINDS = {
  'attention': attention,
  'recurrence': recurrence,
  'short_conv': short_conv,
  'moba': gathered,
}


def try_call(
  seed: int, index: int, ops: list[str] | None = None
) -> tuple[str, str]:
  """('right', 'refused' or 'WRONG', what was called and what came out)."""
  d = Draw(seed, index, ops or OPS)
  try:
    results = KINDS[d.op](d)
  except Refused as error:
    return 'refused', str(error)
  for name, (found, expected) in results.items():
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    if found.shape != expected.shape:
      return 'WRONG', f'{d}: {name} {found.shape} for {expected.shape}'
    finite = np.isfinite(expected)
    wrong = (found[~finite] != expected[~finite]).any()
    error = np.abs(found[finite] - expected[finite]).max(initial=0)
    size = max(1, np.abs(expected[finite]).max(initial=0))
    if wrong or not error <= 1e-4 * size:
      return 'WRONG', f'{d}: {name} off by {error:.3g} of {size:.3g}'
  return 'right', str(d)


def campaign(
  calls: int, *, seed: int = 0, first: int = 0, ops: list[str] | None = None
) -> dict[str, int]:
  """Tries calls; prints those that are wrong, and a line of counts."""
  counts, begin, reasons = (
    dict.fromkeys(('right', 'refused', 'WRONG'), 0),
    time.time(),
    {},
  )
  for index in range(first, first + calls):
    outcome, text = try_call(seed, index, ops)
    counts[outcome] += 1
    if outcome == 'WRONG':
      print(f'--seed={seed} --first={index} --calls=1: {text}', flush=True)
    if outcome == 'refused':
      reason = text[:70]
      reasons[reason] = reasons.get(reason, 0) + 1
    if index % 50 == 49:
      # Programs are kept as long as something may call them again.
      jax.clear_caches()
  print(f'{calls} calls: {counts}, {time.time() - begin:.0f} s')
  for reason, count in sorted(reasons.items(), key=lambda x: -x[1]):
    print(f'  {count} refused: {reason}')
  return counts


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--calls', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--ops', type=lambda text: text.split(','))
  args = parser.parse_args()
  # As tests are compiled, see conftest.py.
  flags = ['--xla_cpu_parallel_codegen_split_count=1']
  if importlib.metadata.version('jaxlib').startswith('0.10.'):
    flags.append('--xla_cpu_use_fusion_emitters=false')
  os.environ['XLA_FLAGS'] = ' '.join(flags)
  parallel.ensure_devices(8)
  found = campaign(args.calls, seed=args.seed, first=args.first, ops=args.ops)
  raise SystemExit(found['WRONG'] > 0)
