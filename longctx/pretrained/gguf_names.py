"""GGUF checkpoints in Hugging Face's words: config, names, order of rows.

llama.cpp has keys and names of its own, and its converter changes tensors: it
permutes rows of q and k (llama), adds 1 to norms (Gemma), transposes (GPT-2),
and sorts rows by q, k and v (GPT-NeoX). All of it is undone here.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from longctx.pretrained.gguf import GGUFFile
from longctx.tasks.gguf_tokenizer import tokenizer_from_gguf
from longctx.tasks.tokenizer import Tokenizer
from longctx.typing import among

TENSOR = re.compile(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)')
# Metadata that changes no logit.
IDLE = {'vocab_size', 'tensor_data_layout', 'rope.scaling.finetuned'}
TOKENS = {'bos': 'bos', 'eos': 'eos', 'padding': 'pad'}

KEYS = {
  'context_length': 'max_position_embeddings',
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
}
LLAMA_KEYS = KEYS | {
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'attention.key_length': 'head_dim',
  'rope.freq_base': 'rope_theta',
}
GEMMA_KEYS = LLAMA_KEYS | {
  'attention.sliding_window': 'sliding_window',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
  'rope.freq_base_swa': 'rope_local_base_freq',
}
GPT2_KEYS = {
  'context_length': 'n_positions',
  'embedding_length': 'n_embd',
  'block_count': 'n_layer',
  'feed_forward_length': 'n_inner',
  'attention.head_count': 'n_head',
  'attention.layer_norm_epsilon': 'layer_norm_epsilon',
}
NEOX_KEYS = KEYS | {
  'attention.layer_norm_epsilon': 'layer_norm_eps',
  'use_parallel_residual': 'use_parallel_residual',
  'rope.freq_base': 'rotary_emb_base',
}

# Names by stems; those that begin with a dot are of a layer.
NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': '.input_layernorm',
  'attn_q': '.self_attn.q_proj',
  'attn_k': '.self_attn.k_proj',
  'attn_v': '.self_attn.v_proj',
  'attn_q_norm': '.self_attn.q_norm',
  'attn_k_norm': '.self_attn.k_norm',
  'attn_output': '.self_attn.o_proj',
  'ffn_norm': '.post_attention_layernorm',
  'ffn_gate': '.mlp.gate_proj',
  'ffn_up': '.mlp.up_proj',
  'ffn_down': '.mlp.down_proj',
}
POST_NORMS = {
  'post_attention_norm': '.post_attention_layernorm',
  'post_ffw_norm': '.post_feedforward_layernorm',
}
OLMO2_NAMES = NAMES | POST_NORMS
GEMMA_NAMES = OLMO2_NAMES | {'ffn_norm': '.pre_feedforward_layernorm'}
PHI3_NAMES = NAMES | {
  'attn_qkv': '.self_attn.qkv_proj',
  'ffn_up': '.mlp.gate_up_proj',
}
GPT2_NAMES = {
  'token_embd': 'transformer.wte',
  'position_embd': 'transformer.wpe',
  'output_norm': 'transformer.ln_f',
  'output': 'lm_head',
  'attn_norm': '.ln_1',
  'attn_qkv': '.attn.c_attn',
  'attn_output': '.attn.c_proj',
  'ffn_norm': '.ln_2',
  'ffn_up': '.mlp.c_fc',
  'ffn_down': '.mlp.c_proj',
}
NEOX_NAMES = {
  'token_embd': 'gpt_neox.embed_in',
  'output_norm': 'gpt_neox.final_layer_norm',
  'output': 'embed_out',
  'attn_norm': '.input_layernorm',
  'attn_qkv': '.attention.query_key_value',
  'attn_output': '.attention.dense',
  'ffn_norm': '.post_attention_layernorm',
  'ffn_up': '.mlp.dense_h_to_4h',
  'ffn_down': '.mlp.dense_4h_to_h',
}


class Architecture(NamedTuple):
  """Architecture of llama.cpp, in Hugging Face's words.

  Attributes:
    config: what GGUF leaves unsaid, or may leave out.
    keys: of the config, by those of the metadata.
    names: of tensors.
    layers: what the names of a layer's tensors begin with.
    partial: option for the share of a head that RoPE rotates; '': all of it.
    pattern: of Gemma's layers, each that many-th has full attention.
  """

  config: Mapping[str, Any]
  keys: Mapping[str, str] = LLAMA_KEYS
  names: Mapping[str, str] = NAMES
  layers: str = 'model.layers'
  partial: str = ''
  pattern: int = 0


SILU = dict(hidden_act='silu')
TANH = dict(hidden_activation='gelu_pytorch_tanh')
ARCHITECTURES = {
  'llama': Architecture(dict(model_type='llama', **SILU)),
  'qwen2': Architecture(dict(model_type='qwen2', **SILU)),
  'qwen3': Architecture(dict(model_type='qwen3', **SILU)),
  'olmo2': Architecture(dict(model_type='olmo2', **SILU), names=OLMO2_NAMES),
  'phi3': Architecture(
    dict(model_type='phi3', **SILU),
    keys=LLAMA_KEYS | {'attention.sliding_window': 'sliding_window'},
    names=PHI3_NAMES,
    partial='partial_rotary_factor',
  ),
  'gemma2': Architecture(
    dict(model_type='gemma2', **TANH), GEMMA_KEYS, GEMMA_NAMES, pattern=2
  ),
  'gemma3': Architecture(
    dict(model_type='gemma3_text', rope_local_base_freq=10_000.0, **TANH),
    GEMMA_KEYS,
    GEMMA_NAMES,
    pattern=6,
  ),
  'gpt2': Architecture(
    dict(model_type='gpt2', activation_function='gelu_new'),
    GPT2_KEYS,
    GPT2_NAMES,
    'transformer.h',
  ),
  'gptneox': Architecture(
    dict(model_type='gpt_neox', hidden_act='gelu'),
    NEOX_KEYS,
    NEOX_NAMES,
    'gpt_neox.layers',
    partial='rotary_pct',
  ),
}
# Layers of the Gemmas of 27B, which scale logits by another width of a head.
GEMMA_27B = (46, 62)


@dataclasses.dataclass
class GGUFSource:
  """GGUF checkpoint: a `Source` by Hugging Face's names.

  Attributes:
    stored: names in the file, and what undoes the change that a tensor has
      there.
  """

  name: str
  config: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  file: GGUFFile
  stored: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]

  def read(self, name: str) -> np.ndarray:
    """A tensor, float32 if it is quantised."""
    stored, undo = self.stored[name]
    return undo(self.file.read(stored))

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer of the metadata, if they have one."""
    has_one = 'tokenizer.ggml.model' in self.file.metadata
    return tokenizer_from_gguf(self.file.metadata) if has_one else None


def gguf_source(file: GGUFFile) -> GGUFSource:
  """The checkpoint of a GGUF file.

  Raises:
    ValueError: an architecture that is not known, or metadata are missing.
    NotImplementedError: metadata or a tensor that has no equal in the config
      or among the tensors of that model of Hugging Face.
  """
  kind = file.metadata.get('general.architecture')
  if kind not in ARCHITECTURES:
    raise ValueError(
      f'{file.path}: unknown architecture {kind!r}{among(kind, ARCHITECTURES)}'
    )
  architecture = ARCHITECTURES[kind]
  config = read_config(file, kind)
  shapes, stored = {}, {}
  for tensor, info in file.tensors.items():
    # They are in the config.
    if tensor.startswith('rope_'):
      continue
    match = TENSOR.fullmatch(tensor)
    layer, stem, part = match.groups() if match else (None, '', '')
    name = architecture.names.get(stem, '')
    if not name or name.startswith('.') == (layer is None):
      raise NotImplementedError(
        f'{file.path}: {tensor} is no tensor of {config["model_type"]}'
      )
    name = f'{architecture.layers}.{layer}{name}' if layer else name
    undo = _undo(kind, stem, part, config)
    stored[f'{name}.{part}'] = tensor, undo
    turned = undo is np.transpose
    shapes[f'{name}.{part}'] = info.shape[::-1] if turned else info.shape
  return GGUFSource(str(file.path), config, shapes, file, stored)


def _undo(
  kind: str, stem: str, part: str, config: Mapping[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
  """What undoes the converter's change of a tensor."""
  heads = config.get('num_attention_heads')
  if kind == 'llama' and stem in ('attn_q', 'attn_k'):
    if stem == 'attn_k':
      heads = config.get('num_key_value_heads', heads)
    return lambda w: _swap(w, heads, len(w) // heads // 2, 2)
  if kind in ('gemma2', 'gemma3') and stem.endswith('norm'):
    return lambda w: w - np.float32(1)
  if kind == 'gptneox' and stem == 'attn_qkv':
    return lambda w: _swap(w, 1, 3, heads)
  is_conv1d = stem in ('attn_qkv', 'attn_output', 'ffn_up', 'ffn_down')
  if kind == 'gpt2' and is_conv1d and part == 'weight':
    return np.transpose
  return lambda w: w


def _swap(w: np.ndarray, *groups: int) -> np.ndarray:
  """Rows in nested groups, of which the inner two change places."""
  return w.reshape(*groups, -1).swapaxes(1, 2).reshape(w.shape)


def read_config(file: GGUFFile, kind: str) -> dict[str, Any]:
  """A config as in config.json, of the metadata of a known architecture."""
  architecture = ARCHITECTURES[kind]
  fields = {
    key.removeprefix(f'{kind}.'): value
    for key, value in file.metadata.items()
    if key.startswith(f'{kind}.')
  }
  config = dict(architecture.config)
  for key, name in architecture.keys.items():
    value = fields.pop(key, None)
    if isinstance(value, list):
      if len(set(value)) != 1:
        raise NotImplementedError(
          f'{file.path}: {kind}.{key} is not that of all layers: {value}'
        )
      value = value[0]
    if value is not None:
      config[name] = value
  missing = [key for key in KEYS if architecture.keys[key] not in config]
  if missing or 'token_embd.weight' not in file.tensors:
    what = f'{kind}.{missing[0]}' if missing else 'token_embd.weight'
    raise ValueError(f'{file.path} lacks {what}')
  config['vocab_size'] = file.tensors['token_embd.weight'].shape[0]
  config['tie_word_embeddings'] = 'output.weight' not in file.tensors
  if kind == 'llama':
    config['attention_bias'] = 'blk.0.attn_q.bias' in file.tensors
  for there, here in TOKENS.items():
    token = file.metadata.get(f'tokenizer.ggml.{there}_token_id')
    if token is not None:
      config[f'{here}_token_id'] = token
  head_dim = _take_head_dim(fields, config, kind)
  _take_windows(fields, config, architecture, head_dim)
  _take_rope(fields, config, file, head_dim)
  for key, value in fields.items():
    if not value or key in IDLE:
      continue
    raise NotImplementedError(
      f'{file.path}: {kind}.{key}={value!r} has no equal in a config of '
      f'{config["model_type"]}'
    )
  return config


def _take_head_dim(
  fields: dict[str, Any], config: dict[str, Any], kind: str
) -> int:
  """The width of a head; those that have to be alike stay where they differ."""
  architecture = ARCHITECTURES[kind]
  rotary = fields.get('rope.dimension_count')
  if kind == 'llama' and rotary:
    config.setdefault('head_dim', rotary)
  width, heads = (
    config[architecture.keys[key]]
    for key in ('embedding_length', 'attention.head_count')
  )
  head_dim = config.get('head_dim', width // heads)
  if architecture.partial and rotary:
    config[architecture.partial] = fields.pop('rope.dimension_count') / head_dim
  for key in ('rope.dimension_count', 'attention.value_length'):
    if fields.get(key) == head_dim:
      del fields[key]
  return head_dim


def _take_windows(
  fields: dict[str, Any],
  config: dict[str, Any],
  architecture: Architecture,
  head_dim: int,
) -> None:
  """Which layers have windows, and how Gemma scales logits."""
  # Phi-4 has 0 for none.
  if 'sliding_window' in config:
    config['sliding_window'] = config['sliding_window'] or None
  if not architecture.pattern:
    return
  layers, key = config['num_hidden_layers'], 'attention.sliding_window_pattern'
  windows = fields.pop(key, architecture.pattern)
  if not isinstance(windows, list):
    windows = [(i + 1) % windows != 0 for i in range(layers)]
  has_window = bool(config.get('sliding_window'))
  config['layer_types'] = [
    'sliding_attention' if has_window and is_local else 'full_attention'
    for is_local in windows
  ]
  if layers in GEMMA_27B:
    head_dim = config['hidden_size'] // config['num_attention_heads']
  config['query_pre_attn_scalar'] = head_dim


def _take_rope(
  fields: dict[str, Any], config: dict[str, Any], file: GGUFFile, head_dim: int
) -> None:
  """The scaling of RoPE, which tensors may tell."""
  scaling = 'rope.scaling.'
  kind = fields.pop(f'{scaling}type', 'none')
  factor = fields.pop(f'{scaling}factor', None)
  original = fields.pop(f'{scaling}original_context_length', None)
  if config['model_type'] == 'phi3' and original:
    config['original_max_position_embeddings'] = original
  rope = {}
  if 'rope_factors_long.weight' in file.tensors:
    rope = dict(rope_type='longrope')
    for x in ('long', 'short'):
      rope[f'{x}_factor'] = file.read(f'rope_factors_{x}.weight').tolist()
    rope['attention_factor'] = fields.pop(f'{scaling}attn_factor', None)
  elif 'rope_freqs.weight' in file.tensors:
    rope = _llama3(config.get('rope_theta', 10_000.0), file, head_dim)
  elif kind in ('linear', 'yarn'):
    rope = dict(rope_type=kind, factor=factor)
    if kind == 'yarn':
      rope['original_max_position_embeddings'] = original
      for x in ('beta_fast', 'beta_slow'):
        rope[x] = fields.pop(f'{scaling}yarn_{x}', None)
  if kind not in ('none', rope.get('rope_type')):
    fields[f'{scaling}type'] = kind
  if rope:
    config['rope_scaling'] = {k: v for k, v in rope.items() if v is not None}


def _llama3(base: float, file: GGUFFile, head_dim: int) -> dict[str, Any]:
  """Llama 3's scaling, of which the file has the factors of frequencies alone.

  Its other numbers are those of all models that have it.
  """
  scaling = dict(
    rope_type='llama3',
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )
  factors = file.read('rope_freqs.weight')
  factor = float(factors.max())
  turns = base ** (-np.arange(0, head_dim, 2) / head_dim) * 8192 / (2 * np.pi)
  stays = np.clip((turns - 1) / (4 - 1), 0, 1)
  wanted = 1 / ((1 - stays) / factor + stays)
  if factors.shape != wanted.shape or not np.allclose(factors, wanted, 1e-3):
    raise NotImplementedError(
      f'{file.path}: rope_freqs.weight is not that of {scaling}, {factor=:g}'
    )
  return scaling | {'factor': factor}
