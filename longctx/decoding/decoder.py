"""Decoder protocol: what a Generator asks of a KV cache, whatever the model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from longctx.decoding.cache import CacheDecoder
from longctx.decoding.gated_cache import GatedDecoder
from longctx.models.transformer import Transformer
from longctx.typing import Array, Float, Int


@runtime_checkable
class Decoder(Protocol):
  """Decoder protocol, over a cache that is a pytree with `lengths`.

  `fields` are those of `DecodingContext`: valid and step.

  Attributes:
    max_new: the most tokens of an answer; None: as many as fit.
  """

  max_new: int | None

  def init(self, model: Transformer, batch_size: int) -> Any:
    """The cache of rows that have not read a token."""

  def prefill(
    self,
    model: Transformer,
    cache: Any,
    tokens: Int[Array, 'B T'],
    logits: Float[Array, 'B V'],
    **fields: Any,
  ) -> tuple[Float[Array, 'B V'], Any]:
    """Reads a chunk of prompts: each row's next logits, `logits` for none."""

  def begin(
    self,
    model: Transformer,
    cache: Any,
    logits: Float[Array, 'B V'],
    **fields: Any,
  ) -> tuple[Float[Array, 'B V'], Any]:
    """Ends the prompts: the logits of each row's first new token."""

  def extend(
    self,
    model: Transformer,
    cache: Any,
    tokens: Int[Array, 'B T'],
    **fields: Any,
  ) -> tuple[Float[Array, 'B T V'], Any]:
    """Reads tokens that were drawn: the logits after each."""


def make_decoder(
  model: Transformer, *, max_new: int | None = None, **options: Any
) -> Decoder:
  """The decoder of a model's kind; options as of `CacheDecoder`."""
  if model.is_gated:
    return GatedDecoder(max_new=max_new, **options)
  return CacheDecoder(**options)
