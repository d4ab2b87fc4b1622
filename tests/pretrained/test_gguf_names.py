"""GGUF checkpoints in Hugging Face's words: names, changes undone, configs.

The names come from the package `gguf`, the changes from what llama.cpp's
converter is known to do.
"""

import math

import numpy as np
import pytest

from longctx.pretrained.gguf import open_gguf
from longctx.pretrained.gguf_names import ARCHITECTURES, gguf_source
from longctx.pretrained.source import open_source
from tests.pretrained.gguf_files import write

# Widths: model, heads, key heads, head, MLP; layers, vocabulary.
D, N, K, H, F, L, V = 8, 2, 1, 4, 12, 2, 10
METADATA = {
  'context_length': 64,
  'embedding_length': D,
  'block_count': L,
  'feed_forward_length': F,
  'attention.head_count': N,
}
SHARED = {
  'max_position_embeddings': 64,
  'hidden_size': D,
  'num_hidden_layers': L,
  'intermediate_size': F,
  'num_attention_heads': N,
  'vocab_size': V,
}

# Names and shapes of a layer's tensors, after Hugging Face.
SEPARATE = {
  'self_attn.q_proj': (N * H, D),
  'self_attn.k_proj': (K * H, D),
  'self_attn.v_proj': (K * H, D),
  'self_attn.o_proj': (D, N * H),
  'mlp.gate_proj': (F, D),
  'mlp.up_proj': (F, D),
  'mlp.down_proj': (D, F),
}
LLAMA = {'input_layernorm': (D,), 'post_attention_layernorm': (D,), **SEPARATE}
OLMO2 = {
  'self_attn.q_norm': (N * H,),
  'self_attn.k_norm': (K * H,),
  'post_attention_layernorm': (D,),
  'post_feedforward_layernorm': (D,),
  **SEPARATE,
}
QK_NORMS = {'self_attn.q_norm': (H,), 'self_attn.k_norm': (H,)}
GEMMA = LLAMA | {
  'pre_feedforward_layernorm': (D,),
  'post_feedforward_layernorm': (D,),
}
LAYERS = {
  'llama': LLAMA,
  'qwen2': LLAMA,
  'qwen3': LLAMA | QK_NORMS,
  'olmo2': OLMO2,
  'gemma2': GEMMA,
  'gemma3': GEMMA | QK_NORMS,
  'phi3': {
    'input_layernorm': (D,),
    'post_attention_layernorm': (D,),
    'self_attn.qkv_proj': (2 * N * H, D),
    'self_attn.o_proj': (D, N * H),
    'mlp.gate_up_proj': (2 * F, D),
    'mlp.down_proj': (D, F),
  },
  'gpt2': {
    'ln_1': (D,),
    'ln_2': (D,),
    'attn.c_attn': (D, 3 * D),
    'attn.c_proj': (D, D),
    'mlp.c_fc': (D, F),
    'mlp.c_proj': (F, D),
  },
  'gptneox': {
    'input_layernorm': (D,),
    'post_attention_layernorm': (D,),
    'attention.query_key_value': (3 * D, D),
    'attention.dense': (D, D),
    'mlp.dense_h_to_4h': (F, D),
    'mlp.dense_4h_to_h': (D, F),
  },
}
TOP = {'model.embed_tokens': (V, D), 'model.norm': (D,)}
TOPS = {
  # Its head is its embedding, always.
  'gemma2': TOP,
  'gpt2': {
    'transformer.wte': (V, D),
    'transformer.wpe': (64, D),
    'transformer.ln_f': (D,),
  },
  'gptneox': {
    'gpt_neox.embed_in': (V, D),
    'gpt_neox.final_layer_norm': (D,),
    'embed_out': (V, D),
  },
}
PREFIXES = {'gpt2': 'transformer.h', 'gptneox': 'gpt_neox.layers'}


def checkpoint(kind):
  """Random tensors by Hugging Face's names; biases where there may be some."""
  prefix = PREFIXES.get(kind, 'model.layers')
  shapes = dict(TOPS.get(kind, TOP | {'lm_head': (V, D)}))
  for i in range(L):
    shapes |= {f'{prefix}.{i}.{k}': x for k, x in LAYERS[kind].items()}
  rng, tensors = np.random.default_rng(0), {}
  for name, shape in shapes.items():
    tensors[f'{name}.weight'] = rng.normal(size=shape).astype(np.float32)
    if kind in ('llama', 'qwen2', *PREFIXES) and '.q_proj' in name + '.q_proj':
      width = shape[-1] if kind == 'gpt2' else shape[0]
      tensors[f'{name}.bias'] = rng.normal(size=width).astype(np.float32)
  return tensors


def converted(kind, name, x):
  """What llama.cpp's converter makes of a tensor."""
  if kind == 'llama' and ('q_proj' in name or 'k_proj' in name):
    heads = N if 'q_proj' in name else K
    return x.reshape(heads, 2, H // 2, -1).swapaxes(1, 2).reshape(x.shape)
  if kind.startswith('gemma') and name.endswith('norm.weight'):
    return x + 1
  if kind == 'gpt2' and x.ndim == 2 and '.h.' in name:
    return x.T
  if kind == 'gptneox' and 'query_key_value' in name:
    q, k, v = x.reshape(N, 3, H, -1).swapaxes(0, 1)
    return np.concatenate([q, k, v]).reshape(x.shape)
  return x


def source_of(tmp_path, kind, metadata, tensors):
  metadata = {f'{kind}.{k}': x for k, x in metadata.items()}
  metadata['general.architecture'] = kind
  return gguf_source(open_gguf(write(tmp_path / 'x.gguf', metadata, tensors)))


def config_of(tmp_path, kind, metadata, tensors=()):
  tensors = {'token_embd.weight': np.zeros((V, D), np.float32), **dict(tensors)}
  return source_of(tmp_path, kind, METADATA | metadata, tensors).config


@pytest.mark.parametrize('kind', ARCHITECTURES)
def test_tensors_are_those_that_were_converted(tmp_path, kind):
  package = pytest.importorskip('gguf')
  kinds = {name: kind for kind, name in package.MODEL_ARCH_NAMES.items()}
  names = package.get_tensor_name_map(kinds[kind], L)
  tensors, stored = checkpoint(kind), {}
  for name, x in tensors.items():
    stem, _, part = name.rpartition('.')
    stored[f'{names.get_name(stem)}.{part}'] = converted(kind, name, x)
  kv = {} if kind in PREFIXES else {'attention.head_count_kv': K}
  source = source_of(tmp_path, kind, METADATA | kv, stored)
  assert source.shapes == {name: x.shape for name, x in tensors.items()}
  for name, x in tensors.items():
    np.testing.assert_allclose(source.read(name), x, atol=5e-7)


def test_a_config_says_what_the_metadata_say(tmp_path):
  metadata = {
    'attention.head_count_kv': K,
    'attention.layer_norm_rms_epsilon': 1e-5,
    'rope.freq_base': 1e5,
    'rope.dimension_count': 16,
    'vocab_size': V,
    'expert_count': 0,
  }
  assert config_of(tmp_path, 'llama', metadata) == SHARED | {
    'model_type': 'llama',
    'num_key_value_heads': K,
    'head_dim': 16,
    'hidden_act': 'silu',
    'attention_bias': False,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e5,
    'tie_word_embeddings': True,
  }


LLAMA3 = dict(
  rope_type='llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)


def llama3_factors(head_dim, base):
  """Factors of wavelengths, as Llama 3.1 has them."""
  factors = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * math.pi * base ** (i / head_dim)
    smooth = min(max((8192 / wavelength - 1) / 3, 0), 1)
    factors.append(1 / ((1 - smooth) / 8 + smooth))
  return np.array(factors, np.float32)


LOCAL, GLOBAL = 'sliding_attention', 'full_attention'


@pytest.mark.parametrize(
  'kind, metadata, tensors, expected',
  [
    (
      'llama',
      {'rope.freq_base': 5e5, 'rope.dimension_count': 16},
      {'rope_freqs.weight': llama3_factors(16, 5e5)},
      {'rope_scaling': LLAMA3, 'head_dim': 16},
    ),
    (
      'gemma3',
      {'rope.scaling.type': 'linear', 'rope.scaling.factor': 8.0},
      {},
      {
        'model_type': 'gemma3_text',
        'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
        'rope_local_base_freq': 1e4,
        'layer_types': [GLOBAL] * L,
      },
    ),
    (
      'qwen3',
      {
        'rope.scaling.type': 'yarn',
        'rope.scaling.factor': 4.0,
        'rope.scaling.original_context_length': 16,
        'rope.scaling.finetuned': True,
      },
      {},
      {
        'rope_scaling': dict(
          rope_type='yarn', factor=4.0, original_max_position_embeddings=16
        )
      },
    ),
    (
      'phi3',
      {
        'rope.dimension_count': 2,
        'rope.scaling.original_context_length': 16,
        'rope.scaling.attn_factor': 1.25,
        'attention.sliding_window': 0,
      },
      {
        'rope_factors_long.weight': np.array([2.0]),
        'rope_factors_short.weight': np.array([1.0]),
      },
      {
        'partial_rotary_factor': 0.5,
        'original_max_position_embeddings': 16,
        'sliding_window': None,
        'rope_scaling': dict(
          rope_type='longrope',
          long_factor=[2.0],
          short_factor=[1.0],
          attention_factor=1.25,
        ),
      },
    ),
    (
      'gemma2',
      {
        'attention.sliding_window': 4,
        'attention.key_length': 6,
        'attention.value_length': 6,
        'attn_logit_softcapping': 50.0,
      },
      {},
      {
        'layer_types': [LOCAL, GLOBAL],
        'sliding_window': 4,
        'query_pre_attn_scalar': 6,
        'attn_logit_softcapping': 50.0,
        'hidden_activation': 'gelu_pytorch_tanh',
      },
    ),
    (
      'gemma3',
      {
        'attention.sliding_window': 4,
        'attention.sliding_window_pattern': [False, True],
        'rope.freq_base_swa': 2e4,
        'attention.head_count_kv': [K, K],
      },
      {},
      {
        'layer_types': [GLOBAL, LOCAL],
        'rope_local_base_freq': 2e4,
        'num_key_value_heads': K,
      },
    ),
    (
      'gemma3',
      {'block_count': 62, 'attention.key_length': 16},
      {},
      {'query_pre_attn_scalar': D // N, 'head_dim': 16},
    ),
    (
      'gptneox',
      {'rope.dimension_count': 1, 'use_parallel_residual': False},
      {'output.weight': np.zeros((V, D), np.float32)},
      {
        'model_type': 'gpt_neox',
        'rotary_pct': 0.25,
        'use_parallel_residual': False,
        'tie_word_embeddings': False,
      },
    ),
  ],
)
def test_configs_have_what_the_metadata_leave_unsaid(
  tmp_path, kind, metadata, tensors, expected
):
  config = config_of(tmp_path, kind, metadata, tensors)
  assert {key: config[key] for key in expected} == expected


WRONG = np.full(2, 3.0, np.float32)


@pytest.mark.parametrize(
  'kind, metadata, tensors, message',
  [
    ('llama', {'expert_count': 8}, {}, r'llama\.expert_count=8 has no equal'),
    (
      'qwen2',
      {'rope.dimension_count': 2},
      {},
      'dimension_count=2 has no equal',
    ),
    ('llama', {'rope.scaling.type': 'longrope'}, {}, 'type=.longrope. has no'),
    (
      'llama',
      {},
      {'rope_freqs.weight': WRONG},
      'not that of .*llama3.*, factor=3',
    ),
    (
      'llama',
      {'attention.head_count_kv': [1, 2]},
      {},
      'not that of all layers',
    ),
    (
      'llama',
      {},
      {'blk.0.ffn_gate_exps.weight': WRONG},
      'is no tensor of llama',
    ),
    ('llama', {}, {'attn_q.weight': WRONG}, 'attn_q.weight is no tensor of'),
    ('gpt2', {}, {'blk.0.attn_q.weight': WRONG}, 'is no tensor of gpt2'),
  ],
)
def test_what_has_no_equal_is_refused_by_name(
  tmp_path, kind, metadata, tensors, message
):
  with pytest.raises(NotImplementedError, match=message):
    config_of(tmp_path, kind, metadata, tensors)


def test_unknown_architectures_and_missing_metadata_are_refused(tmp_path):
  with pytest.raises(
    ValueError, match="architecture 'lama'; did you mean llama"
  ):
    config_of(tmp_path, 'lama', {})
  with pytest.raises(ValueError, match=r'lacks llama\.context_length'):
    source_of(tmp_path, 'llama', {}, {})
  with pytest.raises(ValueError, match=r'lacks token_embd\.weight'):
    source_of(tmp_path, 'llama', METADATA, {})


def test_the_tokenizer_is_that_of_the_metadata(tmp_path):
  metadata = {f'llama.{key}': value for key, value in METADATA.items()}
  metadata['general.architecture'] = 'llama'
  words = {
    'model': 'gpt2',
    'pre': 'smollm',
    'tokens': ['a', 'b', 'ab', '<end>'],
    'token_type': [1, 1, 1, 3],
    'merges': ['a b'],
    'eos_token_id': 3,
  }
  tensors = {'token_embd.weight': np.zeros((4, D))}
  path = write(tmp_path / 'x.gguf', metadata, tensors)
  assert open_source(path).tokenizer() is None
  metadata |= {f'tokenizer.ggml.{key}': x for key, x in words.items()}
  found = open_source(write(path, metadata, tensors)).tokenizer()
  assert (found.encode('abb'), found.eos) == ([2, 1], 3)


def test_a_folder_is_opened_by_the_one_file_that_it_holds(tmp_path):
  source_of(
    tmp_path, 'llama', METADATA, {'token_embd.weight': np.zeros((V, D))}
  )
  for path in (tmp_path, tmp_path / 'x.gguf'):
    assert open_source(path).shapes == {'model.embed_tokens.weight': (V, D)}
  (tmp_path / 'y.gguf').touch()
  with pytest.raises(ValueError, match=r'has 2 \.gguf files: name one, as in'):
    open_source(tmp_path)
