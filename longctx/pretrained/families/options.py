"""Config options of a checkpoint: each is used, or refused by name."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from longctx.ops.rope_scaling import (
  SCALINGS,
  Llama3,
  LongRope,
  Yarn,
  parse_scaling,
)

# What changes no logit: names, how it was trained, how text is made of it.
IDLE = {
  '_attn_implementation',
  '_name_or_path',
  '_num_labels',
  'architectures',
  'attention_dropout',
  'attn_pdrop',
  'auto_map',
  'bos_token_id',
  'cache_implementation',
  'classifier_dropout',
  'dtype',
  'embd_pdrop',
  'eos_token_id',
  'hidden_dropout',
  'id2label',
  'initializer_range',
  'is_llama_config',
  'label2id',
  'max_position_embeddings',
  'model_type',
  'n_ctx',
  'output_past',
  'pad_token_id',
  'predict_special_tokens',
  'problem_type',
  'resid_pdrop',
  'return_dict',
  'summary_activation',
  'summary_first_dropout',
  'summary_proj_to_labels',
  'summary_type',
  'summary_use_proj',
  'task_specific_params',
  'torch_dtype',
  'transformers.js_config',
  'transformers_version',
  'use_cache',
}


class Options:
  """Config options of a checkpoint, as in a Hugging Face config.json.

  Those that nobody took are refused when it is closed.
  """

  def __init__(self, values: Mapping[str, Any], family: str):
    self._left = dict(values)
    self.family = family

  def take(self, name: str, default: Any = None) -> Any:
    """An option, or what the family has where none is given."""
    value = self.given(name)
    return default if value is None else value

  def given(self, name: str, default: Any = None) -> Any:
    """An option, whose null means none and not what the family has."""
    return self._left.pop(name, default)

  def need(self, name: str) -> Any:
    """An option that has to be there."""
    value = self.take(name)
    if value is None:
      raise ValueError(f'the config of {self.family} lacks {name!r}')
    return value

  def expect(self, **values: Any) -> None:
    """Takes options that have to have one value, which is their default."""
    for name, value in values.items():
      found = self.take(name, value)
      if found != value:
        raise ValueError(
          f'{self.family} with {name}={found!r} has no equal here: it must be '
          f'{value!r}'
        )

  def choose(self, name: str, known: Mapping[str, str], default: str) -> str:
    """What an option's value is called here."""
    value = self.take(name, default)
    if value not in known:
      raise ValueError(
        f'{self.family} with {name}={value!r} has no equal here; known: '
        f'{", ".join(known)}'
      )
    return known[value]

  def close(self) -> None:
    """Raises ValueError for the options that nobody took."""
    left = sorted(
      key
      for key, value in self._left.items()
      if key not in IDLE and value not in (None, False, {}, [])
    )
    if left:
      raise ValueError(
        f'{self.family} with {left[0]}={self._left[left[0]]!r} has no equal '
        f'here' + (f', nor has {", ".join(left[1:])}' if left[1:] else '')
      )


ACTIVATIONS = {
  'gelu': 'gelu_exact',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_fast': 'gelu',
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
}
GATED = {
  'gelu': 'geglu_exact',
  'gelu_new': 'geglu',
  'gelu_pytorch_tanh': 'geglu',
  'relu': 'reglu',
  'silu': 'swiglu',
  'swish': 'swiglu',
}


def name_of(activation: str, known: Mapping[str, str]) -> str:
  """The name there of an activation here."""
  for name, here in known.items():
    if here == activation:
      return name
  raise ValueError(f'mlp={activation!r} has no name there')


# Fields of a scaling here and there, for each method.
ROPE_TYPES = {
  'linear': {'factor': 'factor'},
  'yarn': {
    'factor': 'factor',
    'original_context': 'original_max_position_embeddings',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'attention_factor': 'attention_factor',
    'truncate': 'truncate',
  },
  'llama3': {
    'factor': 'factor',
    'original_context': 'original_max_position_embeddings',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
  },
  'longrope': {
    'short_factor': 'short_factor',
    'long_factor': 'long_factor',
    'original_context': 'original_max_position_embeddings',
    'attention_factor': 'attention_factor',
  },
}


def rope_given(options: Options) -> dict[str, Any]:
  """What a config says of RoPE, whichever of its two names says so."""
  found = {
    x: options.take(x) or {} for x in ('rope_parameters', 'rope_scaling')
  }
  for name, value in found.items():
    if not isinstance(value, Mapping):
      raise ValueError(
        f'{options.family} with {name}={value!r} has no equal here'
      )
  newer, older = found.values()
  if newer and older and newer != older:
    raise ValueError(
      f'{options.family} has two scalings of RoPE: rope_parameters={newer} and '
      f'rope_scaling={older}'
    )
  return dict(newer or older)


def rope_fields(
  rope: Mapping[str, Any] | None,
  *,
  family: str,
  base: int | float,
  context: int | None,
  original: int | None = None,
) -> dict[str, Any]:
  """`rope_base` and `rope_scaling` of `rope_parameters` or `rope_scaling`.

  Args:
    rope: as in config.json; None: there is no scaling.
    family: for messages.
    base: where `rope` has none.
    context: max_position_embeddings, which older configs mean.
    original: original_max_position_embeddings, where it stands outside.
  """
  left = {k: v for k, v in (rope or {}).items() if v is not None}
  older = left.pop('type', None)
  kind = left.pop('rope_type', older) or 'default'
  # As Phi-3 called it first.
  kind = 'longrope' if kind == 'su' else kind
  base = float(left.pop('rope_theta', base))
  if kind in ('default', 'none'):
    scaling = 'none'
  elif kind not in ROPE_TYPES:
    raise ValueError(
      f'{family} with rope_type={kind!r} has no equal here; known: default, '
      f'{", ".join(ROPE_TYPES)}'
    )
  else:
    given = {}
    for here, there in ROPE_TYPES[kind].items():
      value = left.pop(there, None)
      if here == 'original_context':
        value = original or value or context
      if isinstance(value, list):
        value = tuple(value)
      if value is not None:
        given[here] = value
    if kind == 'longrope':
      given['context'] = context
      # Unless it is given, it is the share of both contexts.
      factor = left.pop('factor', None)
      if factor is not None and 'attention_factor' not in given:
        given |= _amplitude(factor, given['original_context'], context)
    usual = {field.name: field.default for field in fields(SCALINGS[kind])}
    given = {k: v for k, v in given.items() if v != usual[k]}
    scaling = f'{kind}({", ".join(f"{k}={v!r}" for k, v in given.items())})'
    parse_scaling(scaling)
  if left:
    raise ValueError(
      f'{family} with rope {left} has no equal here, under {kind!r}'
    )
  return {'rope_base': base, 'rope_scaling': scaling}


def _amplitude(factor: float, original: int, context: int) -> dict[str, float]:
  """LongRoPE's `attention_factor` of a factor, where contexts tell another."""
  share, factor = (max(x, 1.0) for x in (context / original, factor))
  if math.isclose(share, factor):
    return {}
  amplitude = math.sqrt(1 + math.log(factor) / math.log(original))
  return {'attention_factor': amplitude}


def rope_options(base: float, scaling: str) -> dict[str, Any]:
  """`rope_parameters` of a base and a scaling, the way back."""
  options: dict[str, Any] = {'rope_type': 'default', 'rope_theta': base}
  kind = scaling.partition('(')[0].strip()
  if kind == 'none':
    return options
  if kind not in ROPE_TYPES:
    raise ValueError(f'rope_scaling={scaling!r} has no name there')
  parsed = parse_scaling(scaling)
  options['rope_type'] = kind
  for here, there in ROPE_TYPES[kind].items():
    value = getattr(parsed, here)
    if value is not None:
      options[there] = value
  if kind == 'longrope':
    options['factor'] = max(parsed.context / parsed.original_context, 1.0)
  return options


def context_options(scaling: str) -> dict[str, int]:
  """Options that tell the contexts of a scaling that knows them."""
  parsed = parse_scaling(scaling)
  if isinstance(parsed, LongRope):
    return {
      'max_position_embeddings': parsed.context,
      'original_max_position_embeddings': parsed.original_context,
    }
  if isinstance(parsed, (Yarn, Llama3)):
    reach = round(parsed.factor * parsed.original_context)
    return {'max_position_embeddings': reach}
  return {}
