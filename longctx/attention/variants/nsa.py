"""Native sparse attention (NSA): compressed, selected and recent tokens."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.capabilities import OF_SELECTIONS
from longctx.attention.context import Context
from longctx.ops import block_selection
from longctx.typing import Array, Float, Natural, Positive


class NativeSparseAttention(Attention):
  """Native sparse attention: compressed, selected and recent tokens.

      out_t = g_c compressed_t + g_s selected_t + g_w window_t, g = σ(W x_t)

  NSA (arXiv:2502.11089). Three softmax attentions of the same queries, each to
  keys and values of its own:

    compressed  one learned vector φ per `compress_block` tokens, every `stride`
                tokens, of the blocks that end at or before the query
    selected    the tokens of top_n blocks: initial ones, local ones and those
                with the largest weights in the compressed branch, summed over
                the query heads of a key head, which share them
    window      the last `window` tokens

  φ is a hidden layer over a block's tokens with an embedding of the place in
  it, one for keys and one for values, for all heads; compressed keys are
  rotated (RoPE) after it, by the position of their first token. The gates are
  of one layer, where the paper has an MLP, and there is one per head.

  Time O(T² / stride) for compressed, O(T top_n block_size) and O(T window) for
  the other branches, memory O(T). Decoding keeps the keys and values of all
  tokens for the selected branch, compressed ones, and a window.

  Attributes:
    compress_block: tokens of a compressed block, l.
    stride: tokens from one compressed block to the next, d.
    block_size: tokens of a selected block, l'.
    top_n: selected blocks, those always read included.
    num_initial: first blocks, always read.
    num_local: last blocks up to the query's own, always read.
    window: keys that the window branch reads.
  """

  mask = masks.Causal()
  mask_is_bound = True
  # Their order: compressed, selected, window.
  branches = 3
  # Of a compressor: one vector per place in a block.
  undecayed: ClassVar = ('embedding',)
  unsupported: ClassVar = {
    **OF_SELECTIONS,
    'analysis': (
      'compressed values pass a hidden layer, so that outputs are no weighted '
      'sums of them: analyse other layers'
    ),
    'alibi': (
      'a compressed block lies at no one distance: take rope, learned or no '
      'positions'
    ),
    'dropout': (
      'weights are drawn by the position of their key, and a compressed block '
      'has none: give the layer attention_dropout=0.0'
    ),
  }
  small: ClassVar = dict(
    compress_block=4, stride=2, block_size=4, top_n=3, num_local=1, window=3
  )

  def __init__(
    self,
    config: AttentionConfig,
    *,
    compress_block: Positive = 32,
    stride: Positive = 16,
    block_size: Positive = 64,
    top_n: Positive = 16,
    num_initial: Natural = 1,
    num_local: Positive = 2,
    window: Positive = 512,
    rngs: nnx.Rngs,
  ):
    if compress_block % stride or block_size % stride:
      raise ValueError(
        f'nsa: {stride=} must divide {compress_block=} and {block_size=}'
      )
    if top_n < num_initial + num_local:
      raise ValueError(
        f'nsa: {top_n=} must be at least {num_initial=} + {num_local=}'
      )
    super().__init__(config, rngs=rngs)
    self.window = masks.SlidingWindow(window - 1)
    self.stride, self.block_size, self.top_n = stride, block_size, top_n
    self.num_initial, self.num_local = num_initial, num_local
    self.compress_key = Compressor(
      config, compress_block, config.head_dim, rngs=rngs
    )
    self.compress_value = Compressor(
      config, compress_block, config.value_dim, rngs=rngs
    )
    self.gate = make_linear(
      config, config.d_model, 3 * config.num_heads, rngs=rngs
    )

  def project(self, x: Float[Array, 'B T D'], context: Context) -> QKV:
    """Rotated queries; keys and values of each head, branch after branch."""
    qkv = self.heads(x, context)
    return qkv._replace(q=self.apply_rope(qkv.q, context))

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The three branches under their gates."""
    q, k, v, x = qkv
    config = self.config
    k, v = (
      jnp.moveaxis(y.reshape(*y.shape[:2], -1, 3, y.shape[-1]), 3, 0)
      for y in (k, v)
    )
    compressed, selected = context.with_gathered_kv(
      block_selection.nsa,
      q,
      k[0],
      v[0],
      self.apply_rope(k[1], context),
      v[1],
      shared=dict(
        compress_k=self.compress_key.weights(),
        compress_v=self.compress_value.weights(),
      ),
      summarize=block_selection.nsa_summaries,
      rope=config.rope,
      scale=config.attention_scale,
      stride=self.stride,
      block_size=self.block_size,
      top_n=self.top_n,
      num_initial=self.num_initial,
      num_local=self.num_local,
    )
    window = context.dot_product_attention(
      q,
      self.apply_rope(k[2], context),
      v[2],
      mask=self.window,
      scale=config.attention_scale,
    )
    gates = nnx.sigmoid(self.gate(context.at_queries(x)))
    gates = gates.reshape(*gates.shape[:2], config.num_heads, 3, 1)
    branches = jnp.stack([compressed, selected, window], axis=3)
    return (gates * branches).sum(3)

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence: projections and mixing."""
    layers = (self.query, self.key, self.value, self.out, self.gate)
    sizes = [layer.kernel.size for layer in layers]
    if self.config.short_conv:
      convs = (self.query_conv, self.key_conv, self.value_conv)
      sizes += [kernel.size for kernel in convs]
    return 2 * seq_len * sum(sizes) + self.mixing_flops(seq_len)

  def mixing_flops(self, seq_len: int) -> int:
    """Of the compression and of the pairs that the branches read."""
    config, t = self.config, np.arange(seq_len)
    L = self.compress_key.block
    compressed = np.maximum(0, (t + 1 - L) // self.stride + 1)
    before, within = np.divmod(t, self.block_size)
    chosen = np.minimum(before, self.top_n - 1) * self.block_size + within + 1
    window = self.window.num_allowed(seq_len, seq_len)
    pairs = int(compressed.sum()) + int(chosen.sum()) + window
    width = config.head_dim + config.value_dim
    weights = sum(
      compressor.inner.size + compressor.outer.size
      for compressor in (self.compress_key, self.compress_value)
    )
    compression = config.num_kv_heads * int(compressed[-1]) * weights
    return 2 * (config.num_heads * width * pairs + compression)


class Compressor(nnx.Module):
  """Compression MLP of key or value blocks, see `ops.block_selection`.

  Attributes:
    block: tokens of a block.
  """

  def __init__(
    self, config: AttentionConfig, block: int, width: int, *, rngs: nnx.Rngs
  ):
    self.block = block
    hidden = 2 * width

    def param(initializer, *shape):
      dtype = jnp.dtype(config.param_dtype)
      return nnx.Param(initializer(rngs.params(), shape, dtype))

    lecun = nnx.initializers.lecun_normal()
    self.embedding = param(nnx.initializers.normal(0.02), block, width)
    self.inner = param(lecun, block * width, hidden)
    self.outer = param(lecun, hidden, width)

  def weights(self) -> block_selection.Compression:
    inner = self.inner[...].reshape(self.block, -1, self.inner.shape[1])
    return block_selection.Compression(
      self.embedding[...], inner, self.outer[...]
    )
