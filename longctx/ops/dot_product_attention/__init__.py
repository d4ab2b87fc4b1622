"""Dot-product attention: one equation, several implementations."""

import functools

import numpy as np

from longctx.masks import Causal, Mask
from longctx.ops.dot_product_attention import (
  cudnn,
  decode,
  flash,
  pallas_tpu,
  reference,
)
from longctx.ops.dot_product_attention.args import (
  AttentionArgs,
  Integers,
  TokenIndices,
  resolve,
)
from longctx.ops.dot_product_attention.dropout import Dropout
from longctx.ops.dot_product_attention.normalizers import NORMALIZERS
from longctx.ops.dot_product_attention.tiling import BlockSizes
from longctx.ops.dot_product_attention.xla import XLABackend
from longctx.ops.target import target
from longctx.typing import Array, Float, Key

__all__ = [
  'BACKENDS',
  'IMPLEMENTATIONS',
  'NORMALIZERS',
  'AttentionArgs',
  'BlockSizes',
  'Dropout',
  'TokenIndices',
  'choose',
  'dot_product_attention',
  'resolve',
]

# Of flash attention: what a ring runs on as well.
BACKENDS = {'pallas': pallas_tpu.PallasTPUBackend(), 'xla': XLABackend()}

# (q, k, v, args) -> (out, lse)
IMPLEMENTATIONS = {
  'cudnn': cudnn.dot_product_attention,
  'decode': decode.dot_product_attention,
  'pallas': functools.partial(flash.attend, BACKENDS['pallas']),
  'reference': reference.dot_product_attention,
  'xla': functools.partial(flash.attend, BACKENDS['xla']),
}

# Why those that run on some machines alone do not support a call, and what is
# best on a platform where they do.
KERNELS = {
  'cudnn': cudnn.unsupported_reason,
  'pallas': pallas_tpu.unsupported_reason,
}
BEST = {'gpu': 'cudnn', 'tpu': 'pallas'}


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
  Gradients reach q, k, v and sink_logits, from out and from lse alike. Those of
  'xla', 'reference' and 'decode' can be differentiated again, forwards and
  backwards.

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
  args = resolve(
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
  )
  name = choose(implementation, q, k, v, args, uses_lse=return_lse)
  out, lse = IMPLEMENTATIONS[name](q, k, v, args)
  out = args.static.normalizer.finish(out, lse)
  return (out, lse) if return_lse else out


def choose(
  implementation: str | None,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  *,
  uses_lse: bool,
) -> str:
  """The name of the implementation for arguments as `resolve` gives them.

  Args:
    implementation: a name, or None for the best that supports the call.
    q: queries.
    k: keys.
    v: values.
    args: the other arguments.
    uses_lse: whether anything reads lse beside out, as rings do.

  Raises:
    ValueError: an unknown name.
    NotImplementedError: the one that is named does not support the call.
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'unknown {implementation=}; known: {sorted(IMPLEMENTATIONS)}, or None'
    )
  name = implementation or BEST.get(target().platform, 'xla')
  if name not in KERNELS:
    return name
  reason = KERNELS[name](q, k, v, args, uses_lse=uses_lse)
  if reason and implementation:
    raise NotImplementedError(
      f"{implementation=}: {reason}; take 'xla', or None for the best"
    )
  return 'xla' if reason else name
