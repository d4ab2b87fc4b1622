"""Transformer language models built from a pattern of attention layers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.masks import Mask
from longctx.models.config import TransformerConfig
from longctx.models.gated import GatedTransformer
from longctx.models.transformer import Transformer
from longctx.parallel import Placement

__all__ = [
  'GatedTransformer',
  'TracedModel',
  'Transformer',
  'TransformerConfig',
  'abstract_params',
  'make_model',
  'validate',
]


class TracedModel(NamedTuple):
  """Traced model, as far as a trace tells.

  Attributes:
    parameter_bytes: of all parameters.
    masks: of each layer; None where it has none.
  """

  parameter_bytes: int
  masks: tuple[Mask | None, ...]


def make_model(config: TransformerConfig, *, rngs: nnx.Rngs) -> Transformer:
  """The model of a config, with a gate where it has one."""
  kind = GatedTransformer if config.gate.keep else Transformer
  return kind(config, rngs=rngs)


@functools.lru_cache(maxsize=16)
def abstract_params(config: TransformerConfig) -> tuple[Any, Any]:
  """(graph, params as ShapeDtypeStructs) of a model, without computing it."""
  model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
  graph, params = nnx.split(model, nnx.Param)
  return graph, nnx.to_pure_dict(params)


def validate(
  config: TransformerConfig,
  seq_len: int,
  *,
  batch_size: int = 1,
  placement: Placement | None = None,
) -> TracedModel:
  """Traces the loss on `seq_len` tokens without compiling or computing.

  Args:
    config: with the vocabulary resolved.
    seq_len: tokens of a row.
    batch_size: rows.
    placement: where the tokens lie on a mesh.

  Returns:
    What is known of the model then.

  Raises:
    ValueError: for a wrong value.
    NotImplementedError: for a combination that is not supported.
  """
  if placement is not None:
    seq_len = placement.layout.padded_len

  graph, params = abstract_params(config)
  traced = []

  def loss(params):
    model = nnx.merge(graph, params)
    leaves = jax.tree.leaves(params)
    masks = tuple(block.attention.mask for block in model.blocks)
    traced.append(TracedModel(sum(x.nbytes for x in leaves), masks))
    tokens = jnp.zeros((batch_size, seq_len), jnp.int32)
    return model.loss(
      tokens,
      tokens,
      jnp.ones(tokens.shape),
      dropout_key=jax.random.key(0),
      placement=placement,
    )

  jax.eval_shape(loss, params)
  return traced[0]
