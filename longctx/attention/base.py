"""Attention layer, the base class: parameters, positions, a call into ops."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.cache_spec import CacheBuilder, CacheSpec, LayerCache
from longctx.attention.capabilities import CAPABILITIES
from longctx.attention.config import AttentionConfig
from longctx.attention.context import Context
from longctx.attention.decoding_context import DecodingContext
from longctx.attention.recurrence import Recurrence
from longctx.ops.alibi import alibi_slopes
from longctx.typing import Array, Float, Int, check_arguments


class QKV(NamedTuple):
  """Queries, keys and values of a layer, with the inputs they are made of.

  Attributes:
    q: queries.
    k: keys.
    v: values.
    x: inputs of the layer, for gates and decays.
  """

  q: Float[Array, 'B T N H']
  k: Float[Array, 'B T K H']
  v: Float[Array, 'B T K V']
  x: Float[Array, 'B T D']


class Attention(nnx.Module, abc.ABC):
  """Attention layer: projects to heads, mixes over positions, projects back.

  A variant is a final subclass that describes itself by `mask`, by
  `recurrence`, or by both where it adds two branches; costs follow. `attend` is
  softmax attention under the mask, or the recurrence, unless overridden.

  Attributes:
    mask: who reads whom.
    recurrence: what is kept of the past.
    mask_is_bound: whether a query reads some of what the mask allows, chosen by
      its contents, and not all.
    branches: sets of keys and values that a layer projects its inputs to.
    undecayed: names of parameters with two axes or more that are vectors, and
      no matrices: weight decay leaves them, and so does Muon.
    unsupported: capability -> why the variant lacks it.
    small: arguments that show the variant's structure within 20 tokens, for
      tests and pictures.
  """

  mask: masks.Mask | None = None
  recurrence: Recurrence | None = None
  mask_is_bound: ClassVar[bool] = False
  branches: ClassVar[int] = 1
  undecayed: ClassVar[tuple[str, ...]] = ()
  unsupported: ClassVar[Mapping[str, str]] = {}
  small: ClassVar[Mapping[str, Any]] = {}

  def __init_subclass__(cls, **kwargs: Any):
    """Holds the arguments of a variant to what their annotations say."""
    super().__init_subclass__(**kwargs)
    if '__init__' in vars(cls):
      cls.__init__ = check_arguments(cls.__init__)

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    self.config = config
    for capability in _required_capabilities(config):
      self.check_supported(capability)
    N, K = config.num_heads, config.num_kv_heads * self.branches
    H, V = config.head_dim, config.value_dim
    D, widths = config.d_model, {'query': N * H, 'key': K * H, 'value': K * V}
    for name, width in widths.items():
      self.add_projection(name, width, rngs=rngs)
    self.out = make_linear(
      config, N * V, D, use_bias=config.out_bias, rngs=rngs
    )
    for name, width in widths.items() if config.short_conv else ():
      setattr(self, f'{name}_conv', _conv_kernel(config, width, rngs))

  def add_projection(
    self,
    name: str,
    width: int,
    *,
    use_bias: bool = False,
    rngs: nnx.Rngs,
  ) -> None:
    """Makes a projection into heads, and its norm where the config asks."""
    config = self.config
    use_bias = use_bias or config.qkv_bias
    inputs = config.d_model
    made = make_linear(config, inputs, width, use_bias=use_bias, rngs=rngs)
    setattr(self, name, made)
    if config.qk_norm != 'none' and not name.startswith('value'):
      width = config.head_dim if config.qk_norm == 'head' else width
      setattr(self, f'{name}_norm', make_norm(config, width, rngs=rngs))

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    context: Context | None = None,
    **fields: Any,
  ) -> Float[Array, 'B Q D']:
    """Applies the layer.

    Args:
      x: inputs.
      context: where the tokens are; None: T tokens in order, on one device.
      **fields: of `Context`, to be set or replaced, such as segment_ids.

    Raises:
      ValueError: inputs of another shape.
      NotImplementedError: what the variant lacks, with the reason.
    """
    if x.ndim != 3 or x.shape[-1] != self.config.d_model:
      raise ValueError(
        f'{x.shape=} must be [B, T, {self.config.d_model}]: rows, tokens and '
        'd_model; a single sequence is x[None]'
      )
    out = self.head_outputs(x, Context.of(context, fields))
    return self.out(out.reshape(*out.shape[:2], -1))

  def head_outputs(
    self, x: Float[Array, 'B T D'], context: Context
  ) -> Float[Array, 'B Q N V']:
    """What each head found, before the projection that adds the heads up."""
    context = self.bind(context)
    out = self.attend(self.project(x, context), context)
    return self.output_transform(out, context.at_queries(x))

  def bind(self, context: Context) -> Context:
    """The context with what the config sets, where the variant supports it.

    Raises:
      NotImplementedError: what the variant lacks, with the reason.
    """
    config = self.config
    if context.segment_ids is not None:
      self.check_supported('packing')
    if context.placement is not None:
      for capability in context.placement.required_capabilities:
        self.check_supported(capability)
    return context.replace(
      dropout_rate=config.attention_dropout,
      implementation=context.implementation or config.implementation,
      block_sizes=context.block_sizes or config.block_sizes,
    )

  def cache_spec(self, capacity: int | None, *, shards: int = 1) -> CacheSpec:
    """What the layer keeps to decode, derived from the calls that it makes.

    Nothing is computed, and parameters need no values.

    Args:
      capacity: the most tokens of a row; None for any number.
      shards: devices that slots are spread over, which rounds their number up.

    Raises:
      NotImplementedError: the layer reads later tokens, or lacks 'decode'.
      ValueError: there is no end, and the layer reads all tokens.
    """
    self.check_supported('decode')
    if shards > 1:
      self.check_supported('sharded_decode')
    spec, reads_later = self._trace(capacity, shards)
    if reads_later:
      raise NotImplementedError(
        f'{type(self).__name__} reads tokens that are not there yet, under '
        f'{reads_later[0]}: to decode, take a causal layer, or a mask that is '
        'known to be causal, such as mask & masks.Causal()'
      )
    return spec

  def apply_with_cache(
    self,
    x: Float[Array, 'B T D'],
    *,
    spec: CacheSpec,
    cache: LayerCache,
    lengths: Int[Array, ' B'],
    **fields: Any,
  ) -> tuple[Float[Array, 'B Q D'], LayerCache]:
    """Outputs at the next tokens of each row, and what the layer then keeps.

    Those of `__call__` on the whole rows, at these tokens.

    Args:
      x: inputs at T more tokens, of which a row may use fewer.
      spec: of the layer.
      cache: what it kept, at first `empty_cache(spec, B)`.
      lengths: tokens that each row has read before.
      **fields: others of `DecodingContext`.
    """
    context = DecodingContext(
      builder=CacheBuilder(spec=spec, cache=cache),
      lengths=lengths,
      positions=lengths[:, None] + jnp.arange(x.shape[1]),
      **fields,
    )
    return self(x, context), tuple(context.builder.arrays)

  def _trace(
    self, capacity: int | None, shards: int = 1
  ) -> tuple[CacheSpec, list[masks.Mask]]:
    """The cache's spec, and masks under which the layer reads later tokens."""
    builder = CacheBuilder(capacity=capacity, shards=shards)
    graph, state = nnx.split(self)

    def run(state, x):
      context = DecodingContext(
        positions=jnp.zeros((1, 1), jnp.int32),
        step=1,
        builder=builder,
        lengths=jnp.zeros(1, jnp.int32),
      )
      layer = nnx.merge(graph, state)
      return layer.attend(layer.project(x, context), context)

    x = jax.ShapeDtypeStruct((1, 1, self.config.d_model), self.config.dtype)
    jax.eval_shape(run, state, x)
    return tuple(builder.spec), builder.reads_later

  def check_supported(self, capability: str) -> None:
    """Raises where the variant lacks a capability.

    Raises:
      NotImplementedError: with the variant's reason.
    """
    if reason := self.unsupported.get(capability):
      raise NotImplementedError(
        f'{type(self).__name__} lacks {capability!r}: {reason}'
      )

  def project(self, x: Float[Array, 'B T D'], context: Context) -> QKV:
    """Queries, keys and values, convolved and rotated."""
    qkv = self.heads(x, context)
    return qkv._replace(
      q=self.apply_rope(qkv.q, context), k=self.apply_rope(qkv.k, context)
    )

  def heads(
    self, x: Float[Array, 'B T D'], context: Context, suffix: str = ''
  ) -> QKV:
    """Queries, keys and values of each head, convolved.

    Args:
      x: inputs.
      context: where the tokens are.
      suffix: of the projections' names, for layers that have several.
    """
    config, parts = self.config, []
    for name in ('query', 'key', 'value'):
      y = getattr(self, name + suffix)(x)
      norm = getattr(self, f'{name}{suffix}_norm', None)
      if norm is not None:
        groups = (-1, norm.num_features)
        y = norm(y.reshape(*y.shape[:2], *groups)).reshape(y.shape)
      if config.short_conv:
        y = context.short_conv(y, getattr(self, f'{name}_conv')[...])
      width = config.value_dim if name == 'value' else config.head_dim
      y = self.qkv_activation(y)
      parts.append(y.reshape(*y.shape[:2], -1, width))
    return QKV(*parts, x)

  def apply_rope(
    self, x: Float[Array, 'B T K H'], context: Context
  ) -> Float[Array, 'B T K H']:
    """Queries or keys as positions turn them, where the config says RoPE."""
    rope = self.config.rope
    if rope is None:
      return x
    return rope.rotate(x, context.true_positions(x.shape[1]))

  def qkv_activation(self, x: Float[Array, 'B T E']) -> Float[Array, 'B T E']:
    """What projections pass through before rotation; here nothing."""
    return x

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """What the heads find: values, mixed over positions.

    Args:
      qkv: of all the tokens.
      context: where the tokens are, with the ops that mix them.
    """
    q, k, v, _ = qkv
    if self.recurrence is not None:
      return context.recurrence(self.recurrence, q, k, v)
    return context.dot_product_attention(
      q, k, v, mask=self.mask, **self.logit_options()
    )

  def logit_options(self) -> dict[str, Any]:
    """What the config asks of the logits: options of the softmax op."""
    config = self.config
    given = {
      'scale': config.attention_scale,
      'logits_soft_cap': config.attention_soft_cap,
    }
    if config.position_encoding == 'alibi':
      given['alibi_slopes'] = alibi_slopes(config.num_heads)
    return {name: value for name, value in given.items() if value is not None}

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """What comes between mixing and the last projection: gates and norms."""
    return out

  def state_bytes(self, seq_len: int, dtype: str | None = None) -> int:
    """Bytes that decoding keeps for one sequence of `seq_len` tokens.

    Args:
      seq_len: tokens read so far.
      dtype: of cached keys and values; None takes the config's. Recurrent
        states are float32.
    """
    spec, _ = self._trace(seq_len)
    return sum(entry.nbytes(dtype) for entry in spec)

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence: projections and mixing."""
    # Every matrix of parameters is applied to every token once.
    _, params = nnx.split(self, nnx.Param)
    matrices = [p.size for p in jax.tree.leaves(params) if p.ndim == 2]
    return seq_len * 2 * sum(matrices) + self.mixing_flops(seq_len)

  def mixing_flops(self, seq_len: int) -> int:
    """FLOPs of `attend` alone on one sequence, counting allowed pairs."""
    config = self.config
    total = 0
    if self.mask is not None:
      width = config.head_dim + config.value_dim
      pairs = self.mask.num_allowed(seq_len, seq_len)
      total += 2 * config.num_heads * width * pairs
    if self.recurrence is not None:
      total += self.recurrence.flops(seq_len)
    return total


def _required_capabilities(config: AttentionConfig) -> list[str]:
  """The capabilities that a config needs."""
  asked = {
    'gqa': config.num_kv_heads < config.num_heads,
    'dropout': config.attention_dropout > 0,
    'short_conv': config.short_conv > 0,
    'pallas': config.implementation == 'pallas',
    'scale': config.attention_scale is not None,
    'soft_cap': config.attention_soft_cap is not None,
    config.position_encoding: config.position_encoding in CAPABILITIES,
  }
  return [capability for capability, is_asked in asked.items() if is_asked]


def make_linear(
  config: AttentionConfig,
  inputs: int,
  outputs: int,
  *,
  use_bias: bool = False,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """A projection in the dtypes of the config."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=use_bias,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    rngs=rngs,
  )


def make_norm(
  config: AttentionConfig, width: int, *, rngs: nnx.Rngs
) -> nnx.RMSNorm:
  """RMSNorm (arXiv:1910.07467) in the dtypes and with the eps of the config."""
  return nnx.RMSNorm(
    width,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    rngs=rngs,
  )


def _conv_kernel(
  config: AttentionConfig, channels: int, rngs: nnx.Rngs
) -> nnx.Param:
  """Taps uniform in ±1/√W: from the start some heads look one token back.

  A kernel that starts as the identity has to find the earlier taps by
  gradient, which delays retrieval by hundreds of steps.
  """
  uniform = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  shape = (config.short_conv, channels)
  param_dtype = jnp.dtype(config.param_dtype)
  return nnx.Param(uniform(rngs.params(), shape, param_dtype))
