"""Llama and its kin: Mistral, Qwen 2 and 3, OLMo 2, Gemma 2 and 3, Phi-3.

One block (RMSNorm, RoPE, grouped heads, a gated MLP) and one set of names; what
differs is said in a `LlamaLike` each.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from longctx.attention import parse_layer
from longctx.models import TransformerConfig
from longctx.ops.rope_scaling import LongRope, RopeScaling, parse_scaling
from longctx.pretrained.families import tensors as tensor_lib
from longctx.pretrained.families.options import (
  GATED,
  Options,
  context_options,
  name_of,
  rope_fields,
  rope_given,
  rope_options,
)
from longctx.pretrained.families.tensors import Tensor

# Base of RoPE in Gemma 3's windows, which its config may leave out.
LOCAL_BASE = 10_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaLike:
  """Family of models whose block is Llama's, but for these.

  Attributes:
    model_type: in config.json.
    architecture: likewise.
    defaults: of options, where a config leaves them out.
    norms: names of the block's norms: before and after attention, before and
      after the MLP; '' where it has none.
    qk_norm: as in `AttentionConfig`.
    qkv_bias: whether it has biases without an option that says so.
    biases: options that say so: of q, k, v and of the projection back, of the
      MLP; '' for none.
    offset: 1 where norms have w for 1 + w.
    is_gemma: whether embeddings are scaled, the MLP's option is
      hidden_activation, and logits have a scale.
    is_fused: whether q, k and v are one tensor, and gate and up another.
    is_partial: whether RoPE may rotate a part of a head.
    windows: which layers have the window that an option gives: 'none', 'all',
      or 'some', as further options say.
    pattern: of those, each that many-th has full attention, where no option
      says; 0: all have windows.
  """

  model_type: str
  architecture: str
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  norms: tuple[str, str, str, str] = (
    'input_layernorm',
    '',
    'post_attention_layernorm',
    '',
  )
  qk_norm: str = 'none'
  qkv_bias: bool = False
  biases: tuple[str, str] = ('attention_bias', 'mlp_bias')
  offset: float = 0.0
  is_gemma: bool = False
  is_fused: bool = False
  is_partial: bool = False
  windows: Literal['none', 'all', 'some'] = 'none'
  pattern: int = 0

  def read(self, options: Options) -> TransformerConfig:
    """The config of a model, from its options; each is taken or refused."""
    default = self.defaults
    D, N = options.need('hidden_size'), options.need('num_attention_heads')
    context = options.take('max_position_embeddings')
    original = options.take(
      'original_max_position_embeddings', default.get('original')
    )
    head_dim = options.take('head_dim', default.get('head_dim', D // N))
    options.expect(pretraining_tp=1, full_attn_mod=1, interpolate_factor=1)
    of_attention, of_mlp = self.biases
    has_bias = bool(of_attention and options.take(of_attention, False))
    activation = 'hidden_activation' if self.is_gemma else 'hidden_act'
    partial = 1.0
    if self.is_partial:
      partial = options.take('partial_rotary_factor', 1.0)
    ropes = self._ropes(options, context, original)
    rope = ropes['full_attention']
    partial = rope.pop('partial_rotary_factor', partial)
    fields: dict[str, Any] = dict(
      vocab_size=options.need('vocab_size'),
      d_model=D,
      num_heads=N,
      num_kv_heads=options.given('num_key_value_heads', default.get('kv')) or N,
      head_dim=head_dim,
      rotary_dim=None if partial == 1 else int(head_dim * partial),
      norm_eps=options.take('rms_norm_eps', default.get('eps', 1e-6)),
      norm_position=self._norm_position,
      qk_norm=self.qk_norm,
      qkv_bias=self.qkv_bias or has_bias,
      out_bias=has_bias,
      mlp_dim=options.need('intermediate_size'),
      mlp=options.choose(activation, GATED, default.get('act', 'silu')),
      mlp_bias=bool(of_mlp and options.take(of_mlp, False)),
      tied_head=options.take('tie_word_embeddings', default.get('tie', False)),
      embedding_scale=1.0,
      layers=tuple(self._layers(options, ropes)),
      **rope,
    )
    if self.is_gemma:
      options.take('hidden_act')
      fields['embedding_scale'] = D**0.5
      scale = options.take('query_pre_attn_scalar', 256)
      fields['attention_scale'] = float(scale) ** -0.5
      for here, there, usual in (
        ('attention_soft_cap', 'attn_logit_softcapping', 'attention_cap'),
        ('logits_soft_cap', 'final_logit_softcapping', 'logits_cap'),
      ):
        fields[here] = options.given(there, default.get(usual))
    options.close()
    return TransformerConfig(**fields)

  @property
  def _norm_position(self) -> str:
    before, after, *_ = self.norms
    return 'both' if before and after else 'after' if after else 'before'

  def _ropes(
    self, options: Options, context: int | None, original: int | None
  ) -> dict[str, dict[str, Any]]:
    """Fields of RoPE, of layers with full attention and of those with less."""
    base = options.take('rope_theta', self.defaults.get('base', 10_000.0))
    rope = rope_given(options)
    local = options.take('rope_local_base_freq', LOCAL_BASE)
    given, bases = {'full_attention': rope}, {'full_attention': base}
    if self.is_gemma and self.qk_norm != 'none':
      bases['sliding_attention'] = local
      nested = any(isinstance(value, Mapping) for value in rope.values())
      given = {**dict.fromkeys(bases), **(rope if nested else given)}
      if unknown := given.keys() - bases:
        raise ValueError(
          f'{self.model_type} with rope {sorted(unknown)} has no equal here'
        )
    found = {}
    for key, rope in given.items():
      rope = dict(rope or {})
      partial = None
      if self.is_partial:
        partial = rope.pop('partial_rotary_factor', None)
      found[key] = rope_fields(
        rope,
        family=self.model_type,
        base=bases[key],
        context=context,
        original=original,
      )
      if partial is not None:
        found[key]['partial_rotary_factor'] = partial
      kind = parse_scaling(found[key]['rope_scaling'])
      if self.is_partial and type(kind) not in (RopeScaling, LongRope):
        raise ValueError(f'{self.model_type} has no scaling but longrope')
    return found

  def _layers(
    self, options: Options, ropes: dict[str, dict[str, Any]]
  ) -> Iterator[str]:
    """A layer's string for each block."""
    count, window, kinds = options.need('num_hidden_layers'), None, None
    if self.windows != 'none':
      window = options.given('sliding_window', self.defaults.get('window'))
    if self.windows == 'some':
      first = options.take('max_window_layers', 0 if self.pattern else 28)
      every = options.take('sliding_window_pattern', self.pattern)
      every = options.take('_sliding_window_pattern', every)
      kinds = options.take('layer_types')
      if not options.take('use_sliding_window', self.is_gemma):
        window = None
    if kinds is None:
      is_full = lambda i: window is None
      if window and self.windows == 'some':
        is_full = lambda i: (i + 1) % every == 0 if every else i < first
      kinds = [
        'full_attention' if is_full(i) else 'sliding_attention'
        for i in range(count)
      ]
    if len(kinds) != count:
      raise ValueError(
        f'{self.model_type} has num_hidden_layers={count} and '
        f'{len(kinds)} layer_types'
      )
    own = ropes.get('sliding_attention', ropes['full_attention'])
    changed = ''.join(
      f', {key}={value!r}'
      for key, value in own.items()
      if value != ropes['full_attention'].get(key)
    )
    for kind in kinds:
      if kind == 'full_attention':
        yield 'full'
      elif kind == 'sliding_attention' and window:
        yield f'sliding_window(window={window}{changed})'
      else:
        raise ValueError(
          f'{self.model_type} with a layer {kind!r} has no equal here'
        )

  def write(self, config: TransformerConfig) -> dict[str, Any]:
    """Options that `read` makes this config of, where any do."""
    layers = [parse_layer(layer) for layer in config.layers]
    windows = {arguments.get('window') for _, arguments in layers} - {None}
    options: dict[str, Any] = dict(
      architectures=[self.architecture],
      model_type=self.model_type,
      vocab_size=config.vocab_size,
      hidden_size=config.d_model,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads or config.num_heads,
      head_dim=config.head_dim or config.d_model // config.num_heads,
      num_hidden_layers=len(layers),
      intermediate_size=config.mlp_dim,
      rms_norm_eps=config.norm_eps,
      tie_word_embeddings=config.tied_head,
      attention_dropout=0.0,
    )
    activation = 'hidden_activation' if self.is_gemma else 'hidden_act'
    options[activation] = name_of(config.mlp, GATED)
    rope = rope_options(config.rope_base, config.rope_scaling)
    head_dim = options['head_dim']
    if config.rotary_dim not in (None, head_dim):
      rope['partial_rotary_factor'] = config.rotary_dim / head_dim
      options['partial_rotary_factor'] = config.rotary_dim / head_dim
    options['rope_parameters'] = rope
    options |= context_options(config.rope_scaling)
    of_attention, of_mlp = self.biases
    if of_attention:
      options[of_attention] = config.out_bias
    if of_mlp:
      options[of_mlp] = config.mlp_bias
    kinds = [
      'sliding_attention' if 'window' in arguments else 'full_attention'
      for _, arguments in layers
    ]
    if self.windows != 'none':
      options['sliding_window'] = min(windows, default=None)
    if self.windows == 'some':
      options['layer_types'] = kinds
      if not self.is_gemma:
        options['use_sliding_window'] = bool(windows)
    if self.is_gemma:
      scale = config.attention_scale or head_dim**-0.5
      options['query_pre_attn_scalar'] = round(scale**-2)
      options['attn_logit_softcapping'] = config.attention_soft_cap
      options['final_logit_softcapping'] = config.logits_soft_cap
      if self.qk_norm != 'none':
        local = next(
          (arguments for _, arguments in layers if 'window' in arguments), {}
        )
        base = local.get('rope_base', config.rope_base)
        scaling = local.get('rope_scaling', config.rope_scaling)
        options['rope_parameters'] = {
          'full_attention': rope,
          'sliding_attention': rope_options(base, scaling),
        }
    return options

  def tensors(self, config: TransformerConfig) -> Iterator[Tensor]:
    """All tensors of a checkpoint, and what they hold."""
    linear, norm = tensor_lib.linear, tensor_lib.norm
    of_norms = (
      'attention_norm',
      'attention_out_norm',
      'mlp_norm',
      'mlp_out_norm',
    )
    yield Tensor(name='model.embed_tokens.weight', paths=('embedding',))
    for i in range(len(config.layers)):
      there, here = f'model.layers.{i}', f'blocks/{i}'
      attention, mlp = f'{here}/attention', f'{here}/mlp'
      for name, path in zip(self.norms, of_norms, strict=True):
        if name:
          path = f'{here}/{path}'
          yield from norm(f'{there}.{name}', path, offset=self.offset)
      qkv = [(f'{x[0]}_proj', f'{attention}/{x}') for x in PROJECTIONS]
      gated = [(f'{x}_proj', f'{mlp}/{x}') for x in ('gate', 'up')]
      if self.is_fused:
        qkv = [('qkv_proj', *(path for _, path in qkv))]
        gated = [('gate_up_proj', *(path for _, path in gated))]
      for name, *paths in qkv:
        bias = config.qkv_bias
        yield from linear(f'{there}.self_attn.{name}', *paths, bias=bias)
      if config.qk_norm != 'none':
        for x in PROJECTIONS[:2]:
          name, path = f'{there}.self_attn.{x[0]}_norm', f'{attention}/{x}_norm'
          yield from norm(name, path, offset=self.offset)
      yield from linear(
        f'{there}.self_attn.o_proj', f'{attention}/out', bias=config.out_bias
      )
      down = ('down_proj', f'{mlp}/down')
      for name, *paths in itertools.chain(gated, [down]):
        yield from linear(f'{there}.mlp.{name}', *paths, bias=config.mlp_bias)
    yield from norm('model.norm', 'norm', offset=self.offset)
    if not config.tied_head:
      yield Tensor(name='lm_head.weight', paths=('head',), transposed=True)


PROJECTIONS = ('query', 'key', 'value')


SANDWICH = (
  'input_layernorm',
  'post_attention_layernorm',
  'pre_feedforward_layernorm',
  'post_feedforward_layernorm',
)
NO_BIASES = ('', '')

FAMILIES = (
  LlamaLike(model_type='llama', architecture='LlamaForCausalLM'),
  LlamaLike(
    model_type='mistral',
    architecture='MistralForCausalLM',
    defaults={'kv': 8, 'window': 4096},
    biases=NO_BIASES,
    windows='all',
  ),
  LlamaLike(
    model_type='qwen2',
    architecture='Qwen2ForCausalLM',
    defaults={'kv': 32, 'window': 4096},
    qkv_bias=True,
    biases=NO_BIASES,
    windows='some',
  ),
  LlamaLike(
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    defaults={'kv': 32, 'head_dim': 128, 'window': 4096},
    qk_norm='head',
    biases=('attention_bias', ''),
    windows='some',
  ),
  LlamaLike(
    model_type='olmo2',
    architecture='Olmo2ForCausalLM',
    defaults={'eps': 1e-5},
    norms=('', 'post_attention_layernorm', '', 'post_feedforward_layernorm'),
    qk_norm='width',
    biases=('attention_bias', ''),
  ),
  LlamaLike(
    model_type='gemma2',
    architecture='Gemma2ForCausalLM',
    defaults={
      'kv': 4,
      'head_dim': 256,
      'window': 4096,
      'act': 'gelu_pytorch_tanh',
      'tie': True,
      'attention_cap': 50.0,
      'logits_cap': 30.0,
    },
    norms=SANDWICH,
    biases=('attention_bias', ''),
    offset=1.0,
    is_gemma=True,
    windows='some',
    pattern=2,
  ),
  LlamaLike(
    model_type='gemma3_text',
    architecture='Gemma3ForCausalLM',
    defaults={
      'kv': 4,
      'head_dim': 256,
      'window': 4096,
      'act': 'gelu_pytorch_tanh',
      'tie': True,
      'base': 1_000_000.0,
    },
    norms=SANDWICH,
    qk_norm='head',
    biases=('attention_bias', ''),
    offset=1.0,
    is_gemma=True,
    windows='some',
    pattern=6,
  ),
  LlamaLike(
    model_type='phi3',
    architecture='Phi3ForCausalLM',
    defaults={'eps': 1e-5, 'original': 4096},
    biases=NO_BIASES,
    is_fused=True,
    is_partial=True,
    windows='all',
  ),
)
