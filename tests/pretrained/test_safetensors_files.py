"""Safetensors checkpoints: what is read, and the line that refuses."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from longctx.pretrained.source import open_source
from longctx.tasks.tokenizer import Tokenizer

INDEX = 'model.safetensors.index.json'
TENSORS = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b': np.arange(4).astype(jnp.bfloat16),
  'c': np.full((2, 1), 0.5, np.float16),
}


@pytest.fixture
def folder(tmp_path):
  """A checkpoint of one file."""
  save_file(TENSORS, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  return tmp_path


def shard(folder, index):
  """Splits the checkpoint into two files, under an index."""
  (folder / 'model.safetensors').unlink()
  save_file({'a': TENSORS['a']}, folder / '1.safetensors')
  save_file({k: TENSORS[k] for k in 'bc'}, folder / '2.safetensors')
  (folder / INDEX).write_text(json.dumps({'weight_map': index}))


@pytest.mark.parametrize('kind', ['folder', 'file', 'no index', 'index'])
def test_tensors_are_read_as_they_are_stored(folder, kind):
  path = folder / 'model.safetensors' if kind == 'file' else folder
  if kind.endswith('index'):
    places = {'a': '1.safetensors', 'b': '2.safetensors', 'c': '2.safetensors'}
    shard(folder, places)
  if kind == 'no index':
    (folder / INDEX).unlink()
  source = open_source(path)
  assert source.config == {'model_type': 'llama'}
  assert source.shapes == {'a': (2, 3), 'b': (4,), 'c': (2, 1)}
  for name, tensor in TENSORS.items():
    assert source.read(name).dtype == tensor.dtype
    np.testing.assert_array_equal(source.read(name), tensor)


def test_one_file_stands_for_what_lies_beside_it(folder):
  save_file(TENSORS, folder / 'consolidated.safetensors')
  assert open_source(folder).shapes.keys() == TENSORS.keys()


def test_other_types_are_refused_when_they_are_read(folder):
  save_file({'mask': np.ones(3, np.int8)}, folder / 'model.safetensors')
  with pytest.raises(
    NotImplementedError, match=r'mask is of type I8; known: F64'
  ):
    open_source(folder).read('mask')


def test_the_tokenizer_is_that_of_the_folder(folder):
  assert open_source(folder).tokenizer() is None
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, 'b': 1}, []))
  saved = Tokenizer.of(backend, None, 1, [], None)
  saved.save(folder)
  found = open_source(folder / 'model.safetensors').tokenizer()
  assert (found.digest, found.eos) == (saved.digest, 1)


def refuse(path, message):
  with pytest.raises(ValueError, match=message) as error:
    open_source(path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('bytes_left', [0, 5, 30, -1])
def test_truncated_files_are_refused(folder, bytes_left):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:bytes_left])
  refuse(folder, r'model.safetensors: it is truncated or damaged \(')


def test_damaged_headers_are_refused(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F3\x00"'))
  refuse(folder, r'model.safetensors: it is truncated or damaged \(')


@pytest.mark.parametrize(
  'index, message',
  [
    ({'a': '3.safetensors'}, '3.safetensors: it is missing'),
    ({'d': '1.safetensors'}, r'1.safetensors has no d, which model\.'),
    ({'a': '2.safetensors'}, r'2.safetensors has no a, which model\.'),
    (None, 'index.json has no weight_map'),
    ({'a': 1}, 'index.json has no weight_map'),
  ],
)
def test_an_index_is_held_to_its_files(folder, index, message):
  shard(folder, index)
  refuse(folder, message)


def test_a_tensor_in_two_files_is_refused(folder):
  shard(folder, {})
  save_file(TENSORS, folder / '3.safetensors')
  refuse(folder, r'1.safetensors and .*3.safetensors both have a')


@pytest.mark.parametrize(
  'text, message',
  [
    (None, 'cannot read .*config.json: No such file'),
    ('{"a"', r'config.json is no JSON \('),
    ('[]', 'config.json holds no JSON object'),
  ],
)
def test_configs_are_held_to_be_one_object(folder, text, message):
  path = folder / 'config.json'
  path.unlink() if text is None else path.write_text(text)
  refuse(folder, message)


def test_folders_without_weights_are_refused(tmp_path):
  refuse(tmp_path, 'has no .safetensors files')
  refuse(tmp_path / 'gone', 'gone is no file or folder that is here')


def hub(monkeypatch, answer):
  """A hub whose client does as `answer` does."""
  client = types.SimpleNamespace(snapshot_download=answer)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', client)


def test_models_of_the_hub_are_opened_at_a_revision(folder, monkeypatch):
  asked = []

  def answer(repository, *, revision, **options):
    asked.append((repository, revision))
    return str(folder)

  hub(monkeypatch, answer)
  assert open_source('org/name').name == 'org/name'
  assert open_source('org/name@v1').shapes.keys() == TENSORS.keys()
  assert asked == [('org/name', None), ('org/name', 'v1')]


def test_a_hub_that_is_out_of_reach_is_told_in_a_line(monkeypatch):
  def answer(*arguments, **options):
    raise ConnectionError('no route\nto the host')

  hub(monkeypatch, answer)
  refuse('org/name', 'org/name is not here, and the .* not give it: no route$')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(NotImplementedError, match=r"pip install -e '\.\[hub\]'"):
    open_source('org/name')
