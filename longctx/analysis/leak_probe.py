"""Leak probe: inputs that an output reads, proven on the computation itself.

    fn = lambda x: attention(x, segment_ids=segment_ids)
    read = reads(fn, x)                              # bool[T, T]
    assert not leaks(read, allowed_pairs(mask, T, segment_ids))

Two probes, because each is blind where the other sees:

`reads` differentiates. Output t reads input s when d fn(x)[:, t] / d x[:, s]
is not exactly zero: a weight of zero gives exactly zero, however deep the
stack, while any weight at all shows, even one far too small to change the
output. It cannot see what passes through `stop_gradient`, integers or argmax.

`changes` perturbs. Output t changes with input s when moving x[:, s] alters any
bit of fn(x)[:, t]. It sees every path, but not an influence that rounding
swallows.

Both probe activations: for a model, `fn` starts at the embeddings. What enters
beside them (positions, segment ids) is held fixed.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longctx.masks import Mask, check_mask
from longctx.typing import Array, Bool, Float, Int


def reads(
  fn: Callable[[Array], Array],
  x: Float[Array, 'B T D'],
  *,
  probes: Sequence[int] | None = None,
  block: int = 64,
  seed: int = 0,
) -> Bool[np.ndarray, 'P T']:
  """Which input positions each probed output position reads, by gradients.

  One vector-Jacobian product per probed position t, against a random cotangent
  that is zero at every other position; a sum of many random terms cancels to
  exactly zero only if every term is zero.

  Args:
    fn: differentiable, from [B, T, D] to [B, T_out, ...].
    x: the point at which to differentiate; random is best, as zeros hide paths.
    probes: output positions to probe; None: all of them.
    block: positions differentiated at once; memory grows with it.
    seed: of the cotangents.

  Returns:
    read[i, s]: output probes[i] reads input s, in any row of the batch.

  Raises:
    ValueError: for x that is not of floats, for a probe outside the output, or
      for a gradient that is not finite, which would prove nothing.
  """
  out_shape = _check(fn, x)
  probes = _probes(probes, out_shape.shape[1])
  key = jax.random.key(seed)

  @_jit
  def probe(x, probes):
    out, vjp = jax.vjp(fn, x)
    noise = jax.random.normal(key, out.shape, out.dtype)

    def row(t):
      cotangent = jnp.zeros_like(out).at[:, t].set(noise[:, t])
      (dx,) = vjp(cotangent)
      return jnp.any(dx != 0, axis=(0, 2)), jnp.all(jnp.isfinite(dx))

    return jax.lax.map(row, probes, batch_size=min(block, len(probes)))

  read, finite = jax.device_get(probe(x, probes))
  if not finite.all():
    bad = probes[~finite][:4].tolist()
    raise ValueError(f'gradients of output positions {bad} are not finite')
  return read


def changes(
  fn: Callable[[Array], Array],
  x: Float[Array, 'B T D'],
  *,
  probes: Sequence[int] | None = None,
  seed: int = 0,
) -> Bool[np.ndarray, 'T_out P']:
  """Which output positions change, in any bit, with each probed input position.

  One run of `fn` per probed position, and one without a change, all by the same
  compiled loop: a row of a batch may round otherwise than its neighbour.

  Args:
    fn: from [B, T, D] to [B, T_out, ...].
    x: the point to start from.
    probes: input positions to move, one at a time, by random values.
    seed: of the moves.

  Returns:
    changed[t, i]: moving x[:, probes[i]] changes fn(x)[:, t].

  Raises:
    ValueError: as `reads`, a value that is not finite included.
  """
  _check(fn, x)
  probes = _probes(probes, x.shape[1])
  key = jax.random.key(seed)

  @_jit
  def probe(x, rows):
    # Added, not put in place of x: x may come from the same key.
    moved = x + jax.random.normal(key, x.shape, x.dtype)

    def row(s):
      here = (jnp.arange(x.shape[1]) == s)[None, :, None]
      return fn(jnp.where(here, moved, x))

    return jax.lax.map(row, rows)

  rows = np.concatenate([[-1], probes])
  out = np.asarray(jax.device_get(probe(x, rows)))
  if not np.isfinite(out.astype(np.float32)).all():
    raise ValueError('outputs are not finite, which proves nothing')
  different = out[1:] != out[0]
  axes = (1, *range(3, different.ndim))
  return different.any(axis=axes).T


def allowed_pairs(
  mask: Mask,
  seq_len: int,
  segment_ids: Int[np.ndarray, ' T'] | None = None,
  *,
  positions: Int[np.ndarray, ' T'] | None = None,
) -> Bool[np.ndarray, 'T T']:
  """What a layer may read: the mask, inside one document.

  Args:
    mask: who reads whom.
    seq_len: tokens T.
    segment_ids: documents packed into a row.
    positions: that the mask reads; None means those of a layer, 0, 1, … in
      each document.
  """
  check_mask(mask, seq_len)
  at = np.arange(seq_len) if positions is None else np.asarray(positions)
  if positions is None and segment_ids is not None:
    ids = np.asarray(segment_ids)
    at = np.array([(ids[:t] == ids[t]).sum() for t in range(seq_len)])
  allowed = mask.allowed(at[:, None], at[None, :])
  allowed = np.broadcast_to(allowed, (seq_len, seq_len))
  if segment_ids is None:
    return allowed
  ids = np.asarray(segment_ids)
  return allowed & (ids[:, None] == ids[None, :])


def reach(layers: Iterable[Bool[np.ndarray, 'T T']]) -> Bool[np.ndarray, 'T T']:
  """What a residual stack may read, from what each of its layers may read.

  Two layers of window w reach 2 w - 1 keys: the product of Boolean matrices,
  each with its diagonal, because a residual stream always reads itself.
  """
  total = None
  for layer in layers:
    layer = layer | np.eye(len(layer), dtype=bool)
    total = layer if total is None else (layer.astype(int) @ total) > 0
  if total is None:
    raise ValueError('reach of no layers: give at least one')
  return total


def leaks(
  read: Bool[np.ndarray, 'T S'], allowed: Bool[np.ndarray, 'T S']
) -> list[tuple[int, int]]:
  """The pairs (t, s) in which output t reads input s and must not."""
  return _pairs(read, allowed, read & ~allowed)


def unread(
  read: Bool[np.ndarray, 'T S'], allowed: Bool[np.ndarray, 'T S']
) -> list[tuple[int, int]]:
  """The pairs (t, s) in which output t may read input s and does not.

  A probe that finds no leak proves something only where this is empty too.
  """
  return _pairs(read, allowed, allowed & ~read)


def assert_causal(
  fn: Callable[[Array], Array], x: Float[Array, 'B T D'], **options
) -> None:
  """Raises AssertionError unless outputs read no later input, and themselves.

  Args:
    fn: from [B, T, D] to [B, T, ...].
    x: the point at which to differentiate.
    **options: of `reads`; `probes` is not among them.
  """
  read = reads(fn, x, **options)
  found = leaks(read, np.tri(*read.shape, dtype=bool))
  assert not found, f'outputs read later inputs, as (t, s): {found[:8]}'
  missing = unread(read, np.eye(*read.shape, dtype=bool))
  assert not missing, f'outputs do not read their own input: {missing[:8]}'


def _jit(fn):
  """`jax.jit` that compiles fast on CPU, where that is all a probe costs."""
  cpu = jax.default_backend() == 'cpu'
  options = {'xla_backend_optimization_level': 0} if cpu else None
  return jax.jit(fn, compiler_options=options)


def _pairs(read, allowed, selected):
  if read.shape != allowed.shape:
    raise ValueError(f'{read.shape=} and {allowed.shape=} must agree')
  return [(int(t), int(s)) for t, s in np.argwhere(selected)]


def _check(fn, x):
  """The output's shape and dtype, after checking that the probe applies."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{x.dtype=}: probe activations, not tokens')
  out = jax.eval_shape(fn, x)
  if len(out.shape) < 2 or out.shape[0] != x.shape[0]:
    raise ValueError(f'{out.shape=} must be [B, T, ...] for {x.shape=}')
  return out


def _probes(probes, length):
  chosen = np.arange(length) if probes is None else np.asarray(probes, np.int32)
  if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= length:
    raise ValueError(f'{probes=} must name positions from 0 to {length - 1}')
  return chosen.astype(np.int32)
