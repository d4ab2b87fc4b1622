"""Longformer: dilated sliding windows and global tokens."""

import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.context import Context
from longctx.typing import Array, Float, Natural, Positive

PROJECTIONS = ('query', 'key', 'value')


class LongformerAttention(Attention):
  """Longformer: softmax attention to a dilated window and global tokens.

      t reads s in head n   if |t - s| = i d_n with 0 ≤ i < window
                            or t < num_global or s < num_global

  Longformer (arXiv:2004.05150), section 3.1; causally with s ≤ t besides. Time
  O(T (window + num_global)), memory O(T). Decoding keeps, per key head, the
  keys that its window reaches, (window - 1) d + 1, and the global ones.

  With `global_projections` a global token reads by queries, keys and values of
  its own, the paper's Q_g, K_g, V_g. (They are made of all tokens, a matrix
  product each, and no other token reads them.) Others read a global token as
  they read their window, in one softmax. The first tokens are those of each
  document.

  Heads of one dilation are mixed by one call, so that `model` and Ulysses split
  those heads: their number, in place of N, has to be a multiple of the devices.

  Attributes:
    window: keys that a query reads on each side, its own position's included; w
      of the paper and of Hugging Face, both sides together, is 2 (window - 1).
    dilation: of all heads, or one for each of as many groups of heads.
    num_global: first tokens that read all and are read by all.
    global_projections: whether global tokens read by projections of their own.
    causal: whether a query reads no later key.
    use_bias: whether the projections into heads have biases.
  """

  small: ClassVar = dict(
    window=2, dilation=3, num_global=2, global_projections=True
  )

  def __init__(
    self,
    config: AttentionConfig,
    *,
    window: Positive = 256,
    dilation: Positive | tuple[Positive, ...] = 1,
    num_global: Natural = 0,
    global_projections: bool = False,
    causal: bool = True,
    use_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    if global_projections and not num_global:
      raise ValueError(
        f'longformer: {global_projections=} with {num_global=} would never be '
        'used'
      )
    self.of_heads = tuple(
      (heads, _local_mask(window, d, num_global, causal, global_projections))
      for d, heads in _heads_by_dilation(dilation, config.num_heads)
    )
    parts = [mask for _, mask in self.of_heads]
    self.mask = functools.reduce(operator.or_, parts)
    self.of_globals = None
    if global_projections:
      self.of_globals = masks.PrefixRows(num_global)
      if causal:
        self.of_globals = masks.Causal() & self.of_globals
      self.mask = self.mask | self.of_globals
    widths = {name: getattr(self, name).out_features for name in PROJECTIONS}
    made = widths if use_bias else {}
    if global_projections:
      made = made | {f'{name}_global': n for name, n in widths.items()}
    for name, width in made.items():
      self.add_projection(name, width, use_bias=use_bias, rngs=rngs)

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The windows, head by head, and what global tokens read."""
    q, k, v, x = qkv
    options = self.logit_options()
    parts = []
    for index, (heads, mask) in enumerate(self.of_heads):
      part = context if index == 0 else context.draw(index)
      own = {
        name: y[jnp.array(heads)] if jnp.ndim(y) else y
        for name, y in options.items()
      }
      q_part, k_part, v_part = _take_heads(q, k, v, heads)
      parts.append(
        part.dot_product_attention(q_part, k_part, v_part, mask=mask, **own)
      )
    out = parts[0]
    if len(parts) > 1:
      order = np.argsort(np.concatenate([heads for heads, _ in self.of_heads]))
      out = jnp.concatenate(parts, axis=2)[:, :, order]
    if self.of_globals is not None:
      own = self.heads(x, context, '_global')
      v = context.values(own.v, v)
      q, k = (self.apply_rope(y, context) for y in (own.q, own.k))
      # Rows that either of both masks leaves without keys are 0 there.
      out = out + context.dot_product_attention(
        q, k, v, mask=self.of_globals, **options
      )
    return out

  def mixing_flops(self, seq_len: int) -> int:
    config = self.config
    pairs = sum(
      len(heads) * mask.num_allowed(seq_len, seq_len)
      for heads, mask in self.of_heads
    )
    if self.of_globals is not None:
      of_globals = self.of_globals.num_allowed(seq_len, seq_len)
      pairs += config.num_heads * of_globals
    return 2 * (config.head_dim + config.value_dim) * pairs

  def load_hugging_face(self, state: Mapping[str, Any]) -> None:
    """Takes over the weights of a `LongformerSelfAttention`.

    That is `use_bias=True, global_projections=True, causal=False` and window =
    attention_window / 2 + 1, with as many heads and no position encoding. The
    projection back, `output.dense` there, is not among them.

    Args:
      state: 'query.weight' [out, in], 'query.bias', 'query_global.weight', …,
        as arrays.

    Raises:
      ValueError: a name is missing or too many, or a shape does not fit.
    """
    names = [*PROJECTIONS, *(f'{name}_global' for name in PROJECTIONS)]
    expected = {f'{n}.{kind}' for n in names for kind in ('weight', 'bias')}
    if set(state) != expected:
      raise ValueError(
        f'{sorted(set(state) ^ expected)} must be in both or neither of the '
        'weights and the layer'
      )
    for name in names:
      module = getattr(self, name, None)
      if module is None or module.bias is None:
        raise ValueError(
          f'the layer has no {name} with a bias: make it with use_bias=True, '
          'global_projections=True'
        )
      for kind, param in (('weight', module.kernel), ('bias', module.bias)):
        value = np.asarray(state[f'{name}.{kind}']).T
        if param.shape != value.shape:
          raise ValueError(f'{name}: {value.shape} must be {param.shape}')
        param[...] = jnp.asarray(value, param.dtype)


def _heads_by_dilation(
  dilation: int | tuple[int, ...], N: int
) -> list[tuple[int, tuple[int, ...]]]:
  """Each dilation with the heads that have it."""
  given = dilation if isinstance(dilation, tuple) else (dilation,)
  if not given or N % len(given):
    raise ValueError(
      f'longformer: {dilation=} must be one number, or as many as divide '
      f'num_heads={N}'
    )
  of_head = np.repeat(given, N // len(given))
  return [
    (d, tuple(np.flatnonzero(of_head == d).tolist()))
    for d in dict.fromkeys(given)
  ]


def _local_mask(
  window: int, dilation: int, num_global: int, causal: bool, apart: bool
) -> masks.Mask:
  """What heads of a dilation read, without what global tokens read `apart`."""
  mask = masks.Dilated(window, dilation)
  if apart:
    mask = mask | masks.PrefixColumns(num_global)
    mask = mask & masks.Beyond(num_global, 0)
  elif num_global:
    mask = mask | masks.GlobalTokens(num_global)
  return masks.Causal() & mask if causal else mask


def _take_heads(q, k, v, heads: tuple[int, ...]):
  """Some of the query heads, with the key heads that they read."""
  N, K = q.shape[2], k.shape[2]
  if len(heads) == N:
    return q, k, v
  of_query = np.array(heads) // (N // K)
  keys, counts = np.unique(of_query, return_counts=True)
  if len(set(counts.tolist())) > 1:
    # Groups of several sizes: each query head brings a copy of its key head.
    keys = of_query
  return q[:, :, np.array(heads)], k[:, :, keys], v[:, :, keys]
