"""Safetensors checkpoints: one file, or several with an index."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from longctx.tasks.tokenizer import Tokenizer

INDEX = 'model.safetensors.index.json'
# safetensors finds bfloat16 in numpy once JAX has been imported.
DTYPES = ('F64', 'F32', 'F16', 'BF16')


@dataclasses.dataclass
class SafetensorsSource:
  """Safetensors checkpoint: a `Source` of float32, float16 and bfloat16.

  Attributes:
    files: which hold the tensors, by the tensors' names.
    folder: where they lie.
  """

  name: str
  config: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  files: Mapping[str, Any]
  folder: Path

  def read(self, name: str) -> np.ndarray:
    """A tensor as it is stored, in memory of its own."""
    dtype = self.files[name].get_slice(name).get_dtype()
    if dtype not in DTYPES:
      raise NotImplementedError(
        f'{self.name}: {name} is of type {dtype}; known: {", ".join(DTYPES)}'
      )
    return self.files[name].get_tensor(name)

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer of tokenizer.json, if it is there."""
    is_there = (self.folder / 'tokenizer.json').exists()
    return Tokenizer.load(self.folder) if is_there else None


def open_safetensors(path: Path, name: str = '') -> SafetensorsSource:
  """Opens a checkpoint: a folder, or one file beside its config.json.

  Of a folder these count: the files that model.safetensors.index.json names,
  else model.safetensors, else all that there are.

  Raises:
    ValueError: a file is missing or damaged, has a tensor that another one has
      too, or lacks one that the index places there.
  """
  folder = path if path.is_dir() else path.parent
  index = read_index(folder / INDEX) if path == folder else {}
  one = folder / 'model.safetensors' if path == folder else path
  paths = sorted({folder / file for file in index.values()})
  paths = paths or (
    [one] if one.exists() else sorted(folder.glob('*.safetensors'))
  )
  if not paths:
    raise ValueError(f'{folder} has no .safetensors files')
  files, places, shapes = {}, {}, {}
  for file in paths:
    opened = open_file(file)
    for tensor in opened.keys():  # noqa: SIM118
      if tensor in files:
        raise ValueError(f'{places[tensor]} and {file} both have {tensor}')
      files[tensor], places[tensor] = opened, file
      shapes[tensor] = tuple(opened.get_slice(tensor).get_shape())
  for tensor, file in index.items():
    if places.get(tensor) != folder / file:
      raise ValueError(
        f'{folder / file} has no {tensor}, which {INDEX} places there'
      )
  config = read_json(folder / 'config.json')
  return SafetensorsSource(name or str(path), config, shapes, files, folder)


def read_index(path: Path) -> Mapping[str, str]:
  """Files by the names of their tensors; empty where there is no index."""
  index = read_json(path).get('weight_map') if path.exists() else {}
  if not isinstance(index, dict) or {type(f) for f in index.values()} - {str}:
    raise ValueError(f'{path} has no weight_map, the files of the tensors')
  return index


def open_file(path: Path) -> Any:
  """Opens one file, whose header is held to its size."""
  try:
    # A mapped file would be in memory beside what is made of it.
    return safe_open(path, 'np', backend='pread')
  except FileNotFoundError:
    why = 'it is missing'
  except OSError as error:
    why = str(error)
  except SafetensorError as error:
    why = str(error).splitlines()[0].rpartition(': ')[2]
    why = f'it is truncated or damaged ({why})'
  raise ValueError(f'cannot read {path}: {why}') from None


def read_json(path: Path) -> Mapping[str, Any]:
  """A JSON file of one object.

  Raises:
    ValueError: it is missing, or is something else.
  """
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error
  except ValueError as error:
    raise ValueError(f'{path} is no JSON ({error})') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds no JSON object')
  return value
