"""Export of models as safetensors and config.json that transformers loads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from longctx.attention import parse_layer
from longctx.models import Transformer, TransformerConfig
from longctx.ops.rope_scaling import parse_scaling
from longctx.pretrained.families import FAMILIES, Family, Options, family_of
from longctx.pretrained.loading import Leaves, flatten
from longctx.pretrained.safetensors_files import INDEX
from longctx.tasks.tokenizer import Tokenizer

# Fields that change no logit, or how one is computed.
HOW = {
  'attention_dropout',
  'block_k',
  'block_q',
  'chunk_size',
  'dtype',
  'implementation',
  'logits_chunk',
  'param_dtype',
  'remat',
}


def export(
  model: Transformer,
  path: str | Path,
  *,
  family: str | None = None,
  tokenizer: Tokenizer | None = None,
) -> Path:
  """Writes a model as model.safetensors and config.json into a folder.

  A family whose config, read again, gives this model's config can hold it. Of
  embeddings with a scale of their own the scaled ones are written, and the head
  that they were tied to apart.

  Args:
    model: of any origin.
    path: the folder, made if need be.
    tokenizer: to be written beside it.
    family: a model_type, such as 'llama'; None: the first that can hold it.

  Returns:
    The folder.

  Raises:
    ValueError: no family has this model; the message has the nearest.
  """
  config = model.config
  leaves = flatten(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
  families = [family_of(family)] if family else list(FAMILIES.values())
  chosen, why = _choose(config, families, leaves)
  if chosen is None and config.embedding_scale != 1:
    config, leaves = _unscaled(config, leaves)
    chosen, why = _choose(config, families, leaves)
  if chosen is None:
    raise ValueError(f'no family holds this model: {why}')
  tensors = {}
  for tensor in chosen.tensors(config):
    parts = [np.asarray(leaves[path]) for path in tensor.paths]
    tensors[tensor.name] = np.ascontiguousarray(tensor.join(parts))
  folder = Path(path).expanduser()
  if (folder / INDEX).exists():
    raise ValueError(
      f'{folder} holds a model of several files, which its {INDEX} names: take '
      'another folder'
    )
  folder.mkdir(parents=True, exist_ok=True)
  # Of tokens a family has its own, which the vocabulary need not have.
  unknown = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  options = chosen.write(config) | unknown | {'dtype': config.param_dtype}
  text = json.dumps(options, indent=2, sort_keys=True)
  (folder / 'config.json').write_text(text + '\n')
  if tokenizer is not None:
    tokenizer.save(folder)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  return folder


def _choose(
  config: TransformerConfig, families: list[Family], leaves: Leaves
) -> tuple[Family | None, str]:
  """The first family that holds a config, or why the nearest does not."""
  nearest = (len(dataclasses.fields(config)) + 1, 'there is none')
  for family in families:
    try:
      options = Options(family.write(config), family.model_type)
      differing = _differences(config, family.read(options))
    except (ValueError, KeyError, TypeError) as error:
      nearest = min(nearest, (len(nearest[1]), f'{family.model_type}: {error}'))
      continue
    held = {path for t in family.tensors(config) for path in t.paths}
    differing += sorted(held ^ leaves.keys())[:1]
    if not differing:
      return family, ''
    why = f'{family.model_type} has {", ".join(differing)}'
    nearest = min(nearest, (len(differing), why))
  return None, nearest[1]


def _differences(config: TransformerConfig, read: TransformerConfig):
  mine, theirs = _meaning(config), _meaning(read)
  return [f'{k}={theirs[k]!r}' for k in mine if mine[k] != theirs[k]]


def _meaning(config: TransformerConfig) -> dict[str, Any]:
  """What a config says of logits, defaults filled in."""
  resolved = config.resolve()
  found = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in HOW
  }
  H, D = resolved.head_dim, resolved.d_model
  found |= dict(
    num_kv_heads=resolved.num_kv_heads,
    head_dim=H,
    value_dim=resolved.value_dim,
    embedding_scale=config.embedding_scale or D**0.5,
    attention_scale=round(config.attention_scale or H**-0.5, 9),
    layers=tuple(map(_layer, config.layers)),
    rope_scaling=parse_scaling(config.rope_scaling),
  )
  if found['rotary_dim'] == H:
    found['rotary_dim'] = None
  if config.position_encoding != 'learned':
    found['max_positions'] = None
  return found


def _layer(text: str) -> tuple[str, tuple]:
  name, arguments = parse_layer(text)
  return name, tuple(sorted(arguments.items()))


def _unscaled(
  config: TransformerConfig, leaves: Leaves
) -> tuple[TransformerConfig, Leaves]:
  """The same model with embeddings that have their scale in them."""
  scale = config.embedding_scale or config.d_model**0.5
  leaves = dict(leaves)
  embedding = leaves['embedding']
  if config.tied_head:
    leaves['head'] = embedding.T
  for name in ('embedding', 'position_table'):
    if name in leaves:
      leaves[name] = jax.numpy.multiply(leaves[name], scale)
  return (
    dataclasses.replace(config, embedding_scale=1.0, tied_head=False),
    leaves,
  )
