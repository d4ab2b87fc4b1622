"""Attention layers: every variant as a Flax NNX module.

A layer is named by a string: a variant's key in `VARIANTS`, optionally with
arguments, such as `'full'`, `'sliding_window(window=64)'` or
`"linear(feature_map='taylor', head_dim=16)"`. Arguments are those of the
variant's constructor and the fields of `AttentionConfig`, which they replace
for that layer alone.
"""

import dataclasses
import inspect
from typing import Any

from flax import nnx

from longctx.attention.base import Attention, AttentionConfig
from longctx.attention.variants.based import BasedAttention
from longctx.attention.variants.bigbird import BigBirdAttention
from longctx.attention.variants.block_sparse import BlockSparseAttention
from longctx.attention.variants.deltanet import DeltaNetAttention
from longctx.attention.variants.differential import DifferentialAttention
from longctx.attention.variants.dilated import DilatedAttention
from longctx.attention.variants.forgetting import ForgettingAttention
from longctx.attention.variants.full import FullAttention
from longctx.attention.variants.gated_deltanet import GatedDeltaNetAttention
from longctx.attention.variants.gla import GatedLinearAttention
from longctx.attention.variants.kda import KimiDeltaAttention
from longctx.attention.variants.lightning import LightningAttention
from longctx.attention.variants.linear import LinearAttention
from longctx.attention.variants.longformer import LongformerAttention
from longctx.attention.variants.mamba2 import Mamba2Attention
from longctx.attention.variants.moba import MixtureOfBlockAttention
from longctx.attention.variants.nsa import NativeSparseAttention
from longctx.attention.variants.output_gate import OutputGateAttention
from longctx.attention.variants.retention import RetentionAttention
from longctx.attention.variants.scalable_softmax import ScalableSoftmaxAttention
from longctx.attention.variants.sigmoid import SigmoidAttention
from longctx.attention.variants.sink_logits import SinkLogitsAttention
from longctx.attention.variants.sink_token import SinkTokenAttention
from longctx.attention.variants.sliding_window import SlidingWindowAttention
from longctx.attention.variants.softmax1 import Softmax1Attention
from longctx.attention.variants.softpick import SoftpickAttention
from longctx.attention.variants.streaming import StreamingAttention
from longctx.attention.variants.window_linear import WindowLinearAttention
from longctx.typing import among, parse_call

__all__ = [
  'VARIANTS',
  'Attention',
  'AttentionConfig',
  'make_attention',
  'make_layer',
  'parse_layer',
]

VARIANTS: dict[str, type[Attention]] = {
  'based': BasedAttention,
  'bigbird': BigBirdAttention,
  'block_sparse': BlockSparseAttention,
  'deltanet': DeltaNetAttention,
  'differential': DifferentialAttention,
  'dilated': DilatedAttention,
  'forgetting': ForgettingAttention,
  'full': FullAttention,
  'gated_deltanet': GatedDeltaNetAttention,
  'gla': GatedLinearAttention,
  'kda': KimiDeltaAttention,
  'lightning': LightningAttention,
  'linear': LinearAttention,
  'longformer': LongformerAttention,
  'mamba2': Mamba2Attention,
  'moba': MixtureOfBlockAttention,
  'nsa': NativeSparseAttention,
  'output_gate': OutputGateAttention,
  'retention': RetentionAttention,
  'scalable_softmax': ScalableSoftmaxAttention,
  'sigmoid': SigmoidAttention,
  'sink_logits': SinkLogitsAttention,
  'sink_token': SinkTokenAttention,
  'sliding_window': SlidingWindowAttention,
  'softmax1': Softmax1Attention,
  'softpick': SoftpickAttention,
  'streaming': StreamingAttention,
  'window_linear': WindowLinearAttention,
}

# Names of what a layer's arguments may replace in the config.
_SHARED = {field.name for field in dataclasses.fields(AttentionConfig)}


def make_layer(
  name: str,
  *,
  d_model: int,
  num_heads: int = 4,
  rngs: nnx.Rngs,
  **arguments: Any,
) -> Attention:
  """Makes any variant as a layer of its own: x [B, T, D] -> [B, T, D].

  Args:
    name: a key of `VARIANTS`.
    d_model: width D.
    num_heads: query heads N.
    rngs: source of the initial parameters.
    **arguments: other fields of `AttentionConfig`, and of the variant, such as
      window=64.

  Raises:
    ValueError, NotImplementedError: as `make_attention` does.
  """
  shared = {key: arguments.pop(key) for key in _SHARED & set(arguments)}
  config = AttentionConfig(d_model=d_model, num_heads=num_heads, **shared)
  layer = make_attention(name, config, rngs=rngs, **arguments)
  return _without_idle(layer, set(shared))


def make_attention(
  layer: str, config: AttentionConfig, *, rngs: nnx.Rngs, **arguments: Any
) -> Attention:
  """Builds the attention module that a layer's string names.

  Args:
    layer: variant and arguments, such as `'sliding_window(window=64)'`.
    config: what the layers of a model share.
    rngs: source of the initial parameters.
    **arguments: more of them.

  Raises:
    ValueError: for an unknown variant, an argument it does not take or a value
      that does not fit.
    NotImplementedError: for a combination that the variant does not support.
  """
  name, given = parse_layer(layer)
  variant = VARIANTS[name]
  # Of __init__: the signature of an nnx.Module's class is *args, **kwargs.
  own = dict(inspect.signature(variant.__init__).parameters)
  for key in ('self', 'config', 'rngs'):
    own.pop(key, None)
  arguments = given | arguments
  for argument in arguments:
    taken = sorted(own) + sorted(_SHARED - {'d_model'})
    if argument not in taken:
      hint = among(argument, taken)
      if argument == 'd_model':
        hint = ', which is the width of the model'
      raise ValueError(f'layer {layer!r}: {name} takes no {argument!r}{hint}')
  for argument, parameter in own.items():
    if parameter.default is parameter.empty and argument not in arguments:
      raise ValueError(f'layer {layer!r}: {name} needs {argument}')
  shared = {key: arguments.pop(key) for key in _SHARED & set(arguments)}
  try:
    config = _of_layer(config, shared)
    made = variant(config, rngs=rngs, **arguments)
  except ValueError as error:
    raise ValueError(f'layer {layer!r}: {error}') from error
  return _without_idle(made, set(shared))


def _of_layer(
  config: AttentionConfig, shared: dict[str, Any]
) -> AttentionConfig:
  """The config of a model with what a layer has in its place, resolved.

  Other heads have keys of their own, unless the model says how many there are.
  """
  resolved = config.resolve()
  if config.num_kv_heads is None and 'num_heads' in shared:
    shared = {'num_kv_heads': None, **shared}
  if shared.get('position_encoding') == 'learned' != config.position_encoding:
    raise ValueError(
      "position_encoding='learned' is the model's, which adds them to its "
      'embeddings: set model.position_encoding'
    )
  return dataclasses.replace(resolved, **shared).resolve()


def _without_idle(layer: Attention, given: set[str]) -> Attention:
  """The layer; raises where fields of the config were given that it ignores."""
  idle = {'chunk_size'} if layer.recurrence is None else set()
  if layer.config.rope is None:
    idle |= {'rope_base', 'rope_scaling', 'rotary_dim'}
  idle |= {'block_q', 'block_k'} if layer.mask is None else set()
  if idle & given:
    raise ValueError(
      f'{type(layer).__name__} has nothing that {sorted(idle & given)} would '
      'set: block_q and block_k are of masks, chunk_size of recurrences, and '
      "rope_... of position_encoding='rope'"
    )
  return layer


def parse_layer(layer: str) -> tuple[str, dict]:
  """Splits `'name(key=value, …)'` into the variant's name and its arguments."""
  try:
    name, arguments = parse_call(layer)
  except ValueError as error:
    raise ValueError(
      f'cannot read the layer {layer!r}: write a variant, as in '
      "'full' or 'sliding_window(window=64)'; on the command line quote the "
      "layers as a Python tuple, --config.model.layers=\"('full', 'linear')\""
    ) from error
  if name not in VARIANTS:
    raise ValueError(f'unknown variant {name!r}{among(name, sorted(VARIANTS))}')
  return name, arguments
