"""Transformer language models built from a pattern of attention layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models.config import TransformerConfig
from longctx.models.gated import GatedTransformer
from longctx.models.transformer import Transformer
from longctx.parallel import Placement

__all__ = [
  'GatedTransformer',
  'Transformer',
  'TransformerConfig',
  'make_model',
  'validate',
]


def make_model(config: TransformerConfig, *, rngs: nnx.Rngs) -> Transformer:
  """The model of a config, with a gate where it has one."""
  kind = GatedTransformer if config.gate.keep else Transformer
  return kind(config, rngs=rngs)


def validate(
  config: TransformerConfig,
  seq_len: int,
  *,
  batch_size: int = 1,
  placement: Placement | None = None,
) -> None:
  """Traces the loss on `seq_len` tokens without compiling or computing.

  Args:
    config: with the vocabulary resolved.
    seq_len: tokens of a row.
    batch_size: rows.
    placement: where the tokens lie on a mesh.

  Raises:
    ValueError: for a wrong value.
    NotImplementedError: for a combination that is not supported.
  """
  if placement is not None:
    seq_len = placement.layout.padded_len

  def loss():
    model = make_model(config, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((batch_size, seq_len), jnp.int32)
    return model.loss(
      tokens,
      tokens,
      jnp.ones(tokens.shape),
      dropout_key=jax.random.key(0),
      placement=placement,
    )

  jax.eval_shape(loss)
