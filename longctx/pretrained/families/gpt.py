"""GPT-2 and GPT-NeoX (Pythia): LayerNorm, biases, one tensor for q, k and v."""

from collections.abc import Iterator
from typing import Any

from longctx.models import TransformerConfig
from longctx.pretrained.families.options import (
  ACTIVATIONS,
  Options,
  context_options,
  name_of,
  rope_fields,
  rope_given,
  rope_options,
)
from longctx.pretrained.families.tensors import Tensor, linear, norm

# What both have.
SHARED = dict(
  norm='layer',
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  embedding_scale=1.0,
)


def _qkv(attention: str) -> tuple[str, ...]:
  return tuple(f'{attention}/{x}' for x in ('query', 'key', 'value'))


class GPT2:
  """GPT-2 (Radford et al., 2019): learned positions, a tied head."""

  model_type = 'gpt2'
  architecture = 'GPT2LMHeadModel'

  def read(self, options: Options) -> TransformerConfig:
    """The config of a model, from its options; each is taken or refused."""
    D = options.take('n_embd', 768)
    options.expect(
      scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False
    )
    config = TransformerConfig(
      **SHARED,
      vocab_size=options.need('vocab_size'),
      d_model=D,
      num_heads=options.take('n_head', 12),
      layers=('full',) * options.take('n_layer', 12),
      mlp_dim=options.take('n_inner', 4 * D),
      mlp=options.choose('activation_function', ACTIVATIONS, 'gelu_new'),
      position_encoding='learned',
      max_positions=options.take('n_positions', 1024),
      norm_eps=options.take('layer_norm_epsilon', 1e-5),
      tied_head=options.take('tie_word_embeddings', True),
    )
    options.close()
    return config

  def write(self, config: TransformerConfig) -> dict[str, Any]:
    """Options that `read` makes this config of, where any do."""
    return dict(
      architectures=[self.architecture],
      model_type=self.model_type,
      vocab_size=config.vocab_size,
      n_embd=config.d_model,
      n_head=config.num_heads,
      n_layer=len(config.layers),
      n_inner=config.mlp_dim,
      n_positions=config.max_positions,
      activation_function=name_of(config.mlp, ACTIVATIONS),
      layer_norm_epsilon=config.norm_eps,
      tie_word_embeddings=config.tied_head,
      **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), 0.0),
    )

  def tensors(self, config: TransformerConfig) -> Iterator[Tensor]:
    """All tensors of a checkpoint, and what they hold."""
    yield Tensor(name='transformer.wte.weight', paths=('embedding',))
    yield Tensor(name='transformer.wpe.weight', paths=('position_table',))
    for i in range(len(config.layers)):
      there, here = f'transformer.h.{i}', f'blocks/{i}'
      yield from norm(f'{there}.ln_1', f'{here}/attention_norm', bias=True)
      yield from norm(f'{there}.ln_2', f'{here}/mlp_norm', bias=True)
      for name, paths in (
        ('attn.c_attn', _qkv(f'{here}/attention')),
        ('attn.c_proj', (f'{here}/attention/out',)),
        ('mlp.c_fc', (f'{here}/mlp/up',)),
        ('mlp.c_proj', (f'{here}/mlp/down',)),
      ):
        # Of a Conv1D, whose outputs are the last axis.
        for kind, part in (('weight', 'kernel'), ('bias', 'bias')):
          yield Tensor(
            name=f'{there}.{name}.{kind}',
            paths=tuple(f'{path}/{part}' for path in paths),
          )
    yield from norm('transformer.ln_f', 'norm', bias=True)
    if not config.tied_head:
      yield Tensor(name='lm_head.weight', paths=('head',), transposed=True)


class GPTNeoX:
  """GPT-NeoX (arXiv:2204.06745) and Pythia: partial RoPE, parallel residual."""

  model_type = 'gpt_neox'
  architecture = 'GPTNeoXForCausalLM'

  def read(self, options: Options) -> TransformerConfig:
    """The config of a model, from its options; each is taken or refused."""
    D, N = options.need('hidden_size'), options.need('num_attention_heads')
    rope = rope_given(options)
    share = options.take('rotary_pct', 0.25)
    share = rope.pop('partial_rotary_factor', None) or share
    base = options.take('rotary_emb_base', 10_000.0)
    options.expect(attention_bias=True)
    config = TransformerConfig(
      **SHARED,
      vocab_size=options.need('vocab_size'),
      d_model=D,
      num_heads=N,
      layers=('full',) * options.need('num_hidden_layers'),
      mlp_dim=options.need('intermediate_size'),
      mlp=options.choose('hidden_act', ACTIVATIONS, 'gelu'),
      norm_eps=options.take('layer_norm_eps', 1e-5),
      parallel_residual=options.take('use_parallel_residual', True),
      tied_head=options.take('tie_word_embeddings', False),
      rotary_dim=int(D // N * share),
      **rope_fields(
        rope,
        family=self.model_type,
        base=base,
        context=options.take('max_position_embeddings'),
      ),
    )
    options.close()
    return config

  def write(self, config: TransformerConfig) -> dict[str, Any]:
    """Options that `read` makes this config of, where any do."""
    head_dim = config.d_model // config.num_heads
    share = (config.rotary_dim or head_dim) / head_dim
    rope = rope_options(config.rope_base, config.rope_scaling)
    return dict(
      architectures=[self.architecture],
      model_type=self.model_type,
      vocab_size=config.vocab_size,
      hidden_size=config.d_model,
      num_attention_heads=config.num_heads,
      num_hidden_layers=len(config.layers),
      intermediate_size=config.mlp_dim,
      hidden_act=name_of(config.mlp, ACTIVATIONS),
      layer_norm_eps=config.norm_eps,
      use_parallel_residual=config.parallel_residual,
      tie_word_embeddings=config.tied_head,
      rotary_pct=share,
      rotary_emb_base=config.rope_base,
      rope_parameters={**rope, 'partial_rotary_factor': share},
      attention_bias=True,
      **context_options(config.rope_scaling),
    )

  def tensors(self, config: TransformerConfig) -> Iterator[Tensor]:
    """All tensors of a checkpoint, and what they hold."""
    yield Tensor(name='gpt_neox.embed_in.weight', paths=('embedding',))
    for i in range(len(config.layers)):
      there, here = f'gpt_neox.layers.{i}', f'blocks/{i}'
      for name, path in (
        ('input_layernorm', 'attention_norm'),
        ('post_attention_layernorm', 'mlp_norm'),
      ):
        yield from norm(f'{there}.{name}', f'{here}/{path}', bias=True)
      yield from linear(
        f'{there}.attention.query_key_value',
        *_qkv(f'{here}/attention'),
        bias=True,
        groups=config.num_heads,
      )
      for name, path in (
        ('attention.dense', 'attention/out'),
        ('mlp.dense_h_to_4h', 'mlp/up'),
        ('mlp.dense_4h_to_h', 'mlp/down'),
      ):
        yield from linear(f'{there}.{name}', f'{here}/{path}', bias=True)
    yield from norm('gpt_neox.final_layer_norm', 'norm', bias=True)
    if not config.tied_head:
      yield Tensor(name='embed_out.weight', paths=('head',), transposed=True)
