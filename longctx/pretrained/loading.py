"""Loading of pretrained models: every tensor is used, or named."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from longctx.models import (
  Transformer,
  TransformerConfig,
  abstract_params,
)
from longctx.parallel.parameters import state_shardings
from longctx.pretrained.families import Options, Tensor, family_of
from longctx.pretrained.source import Source, open_source
from longctx.tasks.tokenizer import Tokenizer

# What older checkpoints store beside parameters: masks, frequencies.
BUFFERS = re.compile(r'.*\.(masked_bias|attn\.bias|attention\.bias|inv_freq)')

# What checkpoints call a head, and may store although it is tied.
HEADS = ('lm_head.weight', 'embed_out.weight')

Leaves = dict[str, Any]


class Pretrained(NamedTuple):
  """Pretrained model, and the tokenizer of its texts; None: it has none."""

  model: Transformer
  tokenizer: Tokenizer | None


def read_config(source: Source) -> TransformerConfig:
  """The config of a checkpoint's model.

  Raises:
    ValueError: of another family, or an option has no equal here.
  """
  values = dict(source.config)
  model_type = values.get('model_type')
  try:
    if not model_type:
      raise ValueError("its config has no 'model_type'")
    family = family_of(model_type)
    return family.read(Options(values, model_type))
  except ValueError as error:
    raise ValueError(f'{source.name}: {error}') from error
  except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
    raise ValueError(
      f'{source.name}: a value of its config is of another kind than '
      f'{model_type} has there ({error})'
    ) from error


def load(
  source: str | Path | Source,
  *,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  fsdp: bool = False,
  **changes: Any,
) -> Pretrained:
  """A pretrained model and its tokenizer, from other people's weights.

  Nothing is initialised first: each tensor is read, cast and placed by its
  sharding, one after the other.

  Args:
    source: as `open_source` takes it, or what that gives.
    dtype: of parameters and computation.
    mesh: from `parallel.make_mesh`, to lay parameters on; None: one device.
    fsdp: whether they are split over `data` too.
    **changes: fields of the config in place of the checkpoint's, such as
      rope_scaling, that leave its parameters as they are.

  Raises:
    ValueError: a tensor is missing, surplus or of another shape, or an option
      has no equal here.
  """
  source = source if isinstance(source, Source) else open_source(source)
  fields = vars(read_config(source)) | dict(dtype=dtype, param_dtype=dtype)
  config = TransformerConfig(**fields | changes)
  tokenizer = source.tokenizer()
  check_vocabulary(source, config, tokenizer)
  graph, abstract = abstract_params(config)
  places = None
  if mesh is not None:
    data = mesh.shape['data'] if fsdp else 1
    places = state_shardings(
      abstract, mesh, data=data, model=mesh.shape['model']
    )
  leaves = flatten(abstract)
  shardings = dict.fromkeys(leaves) if places is None else flatten(places)
  filled = {
    path: jax.device_put(value, shardings[path])
    for path, value in read_parameters(source, config, leaves)
  }
  if new := sorted(leaves.keys() - filled.keys()):
    raise ValueError(
      f'{source.name} has nothing for {new[0]} of this model'
      + (f', nor for {len(new) - 1} more' if new[1:] else '')
    )
  structure = jax.tree.structure(abstract)
  params = jax.tree.unflatten(structure, map(filled.get, leaves))
  return Pretrained(nnx.merge(graph, params), tokenizer)


def check_vocabulary(
  source: Source, config: TransformerConfig, tokenizer: Tokenizer | None
) -> None:
  """Raises ValueError where a tokenizer has tokens that the model has not."""
  if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f'{source.name}: its tokenizer has {tokenizer.vocab_size:,} tokens, and '
      f'its model a vocabulary of {config.vocab_size:,}'
    )


def read_parameters(
  source: Source, config: TransformerConfig, leaves: Leaves
) -> Iterable[tuple[str, np.ndarray]]:
  """Yields each parameter's path and value, in its dtype.

  Args:
    source: of which every tensor is used.
    config: of the model.
    leaves: its parameters, by their paths.

  Raises:
    ValueError: a tensor is missing, surplus or of another shape.
  """
  tensors, names = find_tensors(source, config, leaves)
  if config.tied_head:
    for head in source.shapes.keys() & set(HEADS):
      _check_tied(source, head, names[tensors[0].name])
  for tensor in tensors:
    widths = [leaves[path].shape[-1] for path in tensor.paths]
    parts = tensor.split(source.read(names[tensor.name]), widths)
    for path, part in zip(tensor.paths, parts, strict=True):
      yield path, np.ascontiguousarray(part, jnp.dtype(leaves[path].dtype))


def find_tensors(
  source: Source, config: TransformerConfig, leaves: Leaves
) -> tuple[list[Tensor], dict[str, str]]:
  """The tensors of a model, and what they are called in this source.

  Raises:
    ValueError: one is missing, surplus or of another shape.
  """
  tensors = list(family_of(source.config['model_type']).tensors(config))
  names = _names(source, tensors)
  _check_shapes(source, tensors, names, leaves, is_tied=config.tied_head)
  return tensors, names


def flatten(tree: Any) -> Leaves:
  """Leaves by their paths, as in 'blocks/0/mlp/up/kernel', in their order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {'/'.join(str(k.key) for k in path): leaf for path, leaf in leaves}


def _names(source: Source, tensors: list[Tensor]) -> dict[str, str]:
  """What each tensor is called in this source: some lack the model's prefix."""
  names = {tensor.name: tensor.name for tensor in tensors}
  if not any(name in source.shapes for name in names):
    # The head is beside the model.
    names |= {
      name: name.partition('.')[2] for name in names if name not in HEADS
    }
  return names


def _check_shapes(
  source: Source,
  tensors: list[Tensor],
  names: dict[str, str],
  leaves: Leaves,
  *,
  is_tied: bool,
) -> None:
  wanted = {}
  for tensor in tensors:
    if unknown := [path for path in tensor.paths if path not in leaves]:
      raise ValueError(
        f'{source.name}: {tensor.name} has no place, for this model lacks '
        f'{unknown[0]}'
      )
    shapes = [leaves[path].shape for path in tensor.paths]
    wanted[names[tensor.name]] = tensor.shape(shapes)
  for name, shape in wanted.items():
    found = source.shapes.get(name)
    if found is None:
      raise ValueError(
        f'{source.name} lacks the tensor {name} {list(shape)}, which its '
        'config asks for'
      )
    if tuple(found) != tuple(shape):
      raise ValueError(
        f'{source.name}: {name} is {list(found)}, and its config asks for '
        f'{list(shape)}'
      )
  surplus = sorted(
    name
    for name in source.shapes.keys() - wanted.keys()
    if not BUFFERS.fullmatch(name) and not (is_tied and name in HEADS)
  )
  if surplus:
    more = f', and {len(surplus) - 1} more' if len(surplus) > 1 else ''
    raise ValueError(
      f'{source.name}: nothing here is made of the tensor {surplus[0]} '
      f'{list(source.shapes[surplus[0]])}{more}'
    )


def _check_tied(source: Source, head: str, embedding: str) -> None:
  if not np.array_equal(source.read(head), source.read(embedding)):
    raise ValueError(
      f'{source.name}: tie_word_embeddings is true, and {head} is not '
      f'{embedding}'
    )
