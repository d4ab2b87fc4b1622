"""Dot-product attention: one equation, several implementations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.masks import Causal, Mask, check_mask
from longctx.ops.dot_product_attention import (
  cudnn,
  decode,
  pallas_tpu,
  reference,
  xla,
)
from longctx.ops.dot_product_attention.dropout import Dropout, make_dropout
from longctx.ops.dot_product_attention.normalizers import NORMALIZERS
from longctx.ops.dot_product_attention.tiling import BlockSizes
from longctx.ops.target import target
from longctx.typing import Array, Float, Int, Key

__all__ = [
  'IMPLEMENTATIONS',
  'NORMALIZERS',
  'BlockSizes',
  'Dropout',
  'choose',
  'dot_product_attention',
  'resolve',
]

IMPLEMENTATIONS = {
  'cudnn': cudnn.dot_product_attention,
  'pallas': pallas_tpu.dot_product_attention,
  'reference': reference.dot_product_attention,
  'decode': decode.dot_product_attention,
  'xla': xla.dot_product_attention,
}

# Why those that run on some machines alone do not support a call, and what is
# best on a platform where they do.
KERNELS = {
  'cudnn': cudnn.unsupported_reason,
  'pallas': pallas_tpu.unsupported_reason,
}
BEST = {'gpu': 'cudnn', 'tpu': 'pallas'}

Integers = Int[Array, '...'] | Int[np.ndarray, '...']


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask = Causal(),
  q_positions: Integers | None = None,
  k_positions: Integers | None = None,
  q_segment_ids: Integers | None = None,
  k_segment_ids: Integers | None = None,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  sink_logits: Float[Array, ' N'] | None = None,
  alibi_slopes: Float[Array, ' N'] | Float[np.ndarray, ' N'] | None = None,
  normalizer: str = 'softmax',
  dropout: tuple[float, Key[Array, '']] | Dropout | None = None,
  block_sizes: BlockSizes | None = None,
  implementation: str | None = None,
  return_lse: bool = False,
) -> (
  Float[Array, 'B T N V']
  | tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]
):
  """Attention to the keys that a mask and the segments allow.

    z_ts = cap tanh(scale q_t · k_s / cap) - slope |pos_t - pos_s|

    softmax    out_t = Σ_s exp(z_ts) v_s / D_t         D_t = Σ_s exp(z_ts)
    softmax1   the same                                D_t = 1 + Σ_s exp(z_ts)
    softpick   out_t = Σ_s relu(exp(z_ts) - 1) v_s / D_t
                                                  D_t = Σ_s |exp(z_ts) - 1|
    sigmoid    out_t = Σ_s σ(z_ts) v_s                 D_t = Σ_s 1

  with s over the allowed keys and lse_t = log(D_t). A sink logit adds exp(sink)
  to D: like the 1 of 'softmax1' it takes probability and gives no value.
  Softpick (arXiv:2504.20966) is taken without the paper's epsilon. Sigmoid
  attention (arXiv:2409.04431) has no bias of its own: the paper's -log(S) is
  one more channel of q and k. A query without any key, or with 'softpick' one
  whose logits are all 0, gets out = 0 and lse = -inf (the sink, if there is
  one), and zero gradients. Statistics and sums are float32; out is rounded
  once, and once more by 'sigmoid' and by sinks.

  Query head n reads key head n // (N / K) (grouped queries, arXiv:2305.13245).
  Gradients reach q, k, v and sink_logits, from out and from lse alike, and can
  be differentiated again, forwards and backwards (not those of cuDNN).

  Args:
    q: queries.
    k: keys; K divides N.
    v: values, of any width V.
    mask: who reads whom, as a function of positions.
    q_positions: int [T] or [B, T]; 0 to T - 1 when None.
    k_positions: int [S] or [B, S]; 0 to S - 1 when None.
    q_segment_ids: int [B, T]; a query reads keys of its own segment alone. Any
      integers, none of which is special.
    k_segment_ids: int [B, S]; those of the queries when None and T = S.
    scale: of the products q · k; H**-0.5 when None.
    logits_soft_cap: cap on |z|, before ALiBi; None for none.
    sink_logits: a learned logit per head, for 'softmax' and 'softmax1'.
    alibi_slopes: per head (arXiv:2108.12409); taken as constants, without a
      gradient.
    normalizer: 'softmax', 'softmax1', 'softpick' or 'sigmoid'.
    dropout: (rate, key), a probability and a typed key. Weights are dropped
      after normalisation and the kept ones divided by 1 - rate. Which ones
      depends on the key, batch row, head, segment and positions, and not on the
      implementation or block sizes. Batch rows and heads are counted in the
      arrays given; a `Dropout` also says where those begin in larger ones.
    block_sizes: for blockwise implementations; None for heuristics.
    implementation: 'reference' (memory B N T S), 'decode' (the same, for
      few queries), 'xla' (memory linear in T and S, that of second derivatives
      too), 'pallas' (kernels for TPUs; on a CPU they are interpreted, to check
      values), 'cudnn' (on NVIDIA GPUs, plain causal and windowed attention,
      without second derivatives) or None for the best that supports the call:
      'pallas' on TPUs and 'cudnn' on GPUs, else 'xla'.
    return_lse: whether to return lse too.

  Returns:
    out in the dtype of q; with `return_lse` also lse in float32. Parts over
    disjoint keys are put together by `ops.merge`, which takes lse = -inf; those
    of 'sigmoid' just add up, and lse is the log of the number of keys.

  Raises:
    ValueError: shapes that do not fit together, an unknown name.
    NotImplementedError: a combination that the implementation lacks.
  """
  call = resolve(
    q,
    k,
    v,
    mask=mask,
    q_positions=q_positions,
    k_positions=k_positions,
    q_segment_ids=q_segment_ids,
    k_segment_ids=k_segment_ids,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    sink_logits=sink_logits,
    alibi_slopes=alibi_slopes,
    normalizer=normalizer,
    dropout=dropout,
    block_sizes=block_sizes,
    implementation=implementation,
  )
  uses_lse = return_lse or call['sink_logits'] is not None
  name = choose(implementation, q, k, v, uses_lse=uses_lse, **call)
  out, lse = IMPLEMENTATIONS[name](q, k, v, **call)
  out = NORMALIZERS[normalizer].finish(out, lse)
  return (out, lse) if return_lse else out


def choose(
  implementation: str | None,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  uses_lse: bool,
  **call: Any,
) -> str:
  """The name of the implementation for arguments as `resolve` gives them.

  Args:
    implementation: a name, or None for the best that supports the call.
    q: queries.
    k: keys.
    v: values.
    uses_lse: whether anything reads lse beside out, as rings do.
    **call: the other arguments.

  Raises:
    NotImplementedError: the one that is named does not support the call.
  """
  if implementation not in (None, *KERNELS):
    return implementation
  name = implementation or BEST.get(target().platform, 'xla')
  if name == 'xla':
    return name
  reason = KERNELS[name](q, k, v, uses_lse=uses_lse, **call)
  if reason and implementation:
    raise NotImplementedError(
      f"{implementation=}: {reason}; take 'xla', or None for the best"
    )
  return 'xla' if reason else name


def resolve(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask,
  q_positions: Integers | None,
  k_positions: Integers | None,
  q_segment_ids: Integers | None,
  k_segment_ids: Integers | None,
  scale: float | None,
  logits_soft_cap: float | None,
  sink_logits: Float[Array, ' N'] | None,
  alibi_slopes: Float[Array, ' N'] | Float[np.ndarray, ' N'] | None,
  normalizer: str,
  dropout: tuple[float, Key[Array, '']] | Dropout | None,
  block_sizes: BlockSizes | None,
  implementation: str | None,
) -> dict[str, Any]:
  """The checked arguments of an implementation, defaults filled in.

  For `dot_product_attention`, here and on meshes; see there for the arguments.
  What an implementation returns is still to be given to `Normalizer.finish`.
  """
  _check_arrays(q, k, v)
  _check_names(normalizer, implementation)
  B, T, N, H = q.shape
  S = k.shape[1]
  at_zero = q_positions is None and k_positions is None
  check_mask(mask, *((T, S) if at_zero else (max(T, S),)))
  if k_segment_ids is None and T == S:
    k_segment_ids = q_segment_ids
  if (q_segment_ids is None) != (k_segment_ids is None):
    raise ValueError(
      'give both q_segment_ids and k_segment_ids, or neither; got '
      f'{q_segment_ids is not None=}, {k_segment_ids is not None=}, {T=}, {S=}'
    )
  if logits_soft_cap is not None and logits_soft_cap <= 0:
    raise ValueError(f'{logits_soft_cap=} must be positive, or None')
  if alibi_slopes is not None:
    alibi_slopes = _per_head('alibi_slopes', jnp.asarray(alibi_slopes), N)
    alibi_slopes = jax.lax.stop_gradient(alibi_slopes)
  if sink_logits is not None and not NORMALIZERS[normalizer].has_sink:
    raise NotImplementedError(
      f'sink_logits take their share of a softmax, and {normalizer=} is none: '
      "leave them out, or take 'softmax'"
    )
  if sink_logits is not None:
    sink_logits = _per_head('sink_logits', sink_logits, N)
  if NORMALIZERS[normalizer].start:
    one = jnp.zeros(N, jnp.promote_types(q.dtype, jnp.float32))
    sink_logits = one if sink_logits is None else jnp.logaddexp(sink_logits, 0)
  return dict(
    mask=mask,
    q_positions=_indices('q_positions', q_positions, (1, B), T),
    k_positions=_indices('k_positions', k_positions, (1, B), S),
    q_segment_ids=_indices('q_segment_ids', q_segment_ids, (B,), T),
    k_segment_ids=_indices('k_segment_ids', k_segment_ids, (B,), S),
    scale=H**-0.5 if scale is None else scale,
    logits_soft_cap=logits_soft_cap,
    sink_logits=sink_logits,
    alibi_slopes=alibi_slopes,
    normalizer=NORMALIZERS[normalizer],
    dropout=make_dropout(dropout),
    block_sizes=block_sizes,
  )


def _check_arrays(q: Array, k: Array, v: Array) -> None:
  """Raises where q, k and v do not fit together."""
  shapes = f'{q.shape=}, {k.shape=}, {v.shape=}'
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(f'q, k and v need 4 axes, BTNH and BSKH: {shapes}')
  if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
    raise ValueError(f'B, S and K must agree between q, k and v: {shapes}')
  if q.shape[3] != k.shape[3]:
    raise ValueError(f'q and k must have the same head dim: {shapes}')
  N, K = q.shape[2], k.shape[2]
  if K == 0 or N % K:
    raise ValueError(f'{N=} query heads must be a multiple of {K=} key heads')
  if 0 in q.shape or 0 in v.shape:
    raise ValueError(f'no axis may be empty: {shapes}')


def _check_names(normalizer: str, implementation: str | None) -> None:
  """Raises for an unknown name."""
  if normalizer not in NORMALIZERS:
    raise ValueError(f'unknown {normalizer=}; known: {sorted(NORMALIZERS)}')
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'unknown {implementation=}; known: {sorted(IMPLEMENTATIONS)}, or None'
    )


def _per_head(name: str, x: Array, N: int) -> Array:
  if x.shape != (N,):
    raise ValueError(
      f'{name} must have one entry per query head, {N=}: {x.shape=}'
    )
  return x


def _indices(
  name: str, x: Array | np.ndarray | None, batches: tuple[int, ...], length: int
) -> Array | None:
  """An integer array with a batch axis of one of the sizes given."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim == 1 and 1 in batches:
    x = x[None]
  if x.ndim != 2 or x.shape[0] not in batches or x.shape[1] != length:
    raise ValueError(
      f'{name} must have {length=} and batch size {batches[-1]}: {x.shape=}'
    )
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f'{name} must be integers: {x.dtype=}')
  return x
