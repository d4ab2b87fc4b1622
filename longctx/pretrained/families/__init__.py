"""Model families: what a checkpoint's config and tensors are called here."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from longctx.models import TransformerConfig
from longctx.pretrained.families.gpt import GPT2, GPTNeoX
from longctx.pretrained.families.llama import FAMILIES as LLAMA_LIKE
from longctx.pretrained.families.options import Options
from longctx.pretrained.families.tensors import Tensor
from longctx.typing import among

__all__ = ['FAMILIES', 'Family', 'Options', 'Tensor', 'family_of']


@runtime_checkable
class Family(Protocol):
  """Model family: its config and its tensors, in and out.

  Attributes:
    model_type: in config.json.
    architecture: likewise.
  """

  model_type: str
  architecture: str

  def read(self, options: Options) -> TransformerConfig:
    """The config of a model, from its options; each is taken or refused."""

  def write(self, config: TransformerConfig) -> dict[str, Any]:
    """Options that `read` makes this config of, where any do."""

  def tensors(self, config: TransformerConfig) -> Iterator[Tensor]:
    """All tensors of a checkpoint, and what they hold."""


FAMILIES: dict[str, Family] = {
  family.model_type: family for family in (*LLAMA_LIKE, GPT2(), GPTNeoX())
}


def family_of(model_type: str) -> Family:
  """The family that a config.json names; ValueError for an unknown one."""
  if model_type not in FAMILIES:
    raise ValueError(
      f'unknown model_type {model_type!r}{among(model_type, FAMILIES)}'
    )
  return FAMILIES[model_type]
