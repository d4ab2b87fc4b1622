"""Families: the logits of other people's code, in and out."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.decoding import cache as cache_lib
from longctx.models import Transformer, TransformerConfig
from longctx.parallel import make_mesh
from longctx.pretrained.exporting import export
from longctx.pretrained.families import FAMILIES
from longctx.pretrained.loading import flatten, load
from longctx.pretrained.safetensors_files import open_safetensors
from tests.pretrained.make_fixtures import CASES, FOLDER

FAST = {'xla_backend_optimization_level': 0}


def expected(case):
  with np.load(FOLDER / case / 'expected.npz') as file:
    return dict(file)


def logits(model, tokens, **fields):
  graph, params = nnx.split(model)
  run = lambda params, tokens: nnx.merge(graph, params)(tokens, **fields)
  return jax.jit(run, compiler_options=FAST)(params, tokens)


def test_every_family_has_a_case():
  types = {
    json.loads((FOLDER / case / 'config.json').read_text())['model_type']
    for case in CASES
  }
  assert types == set(FAMILIES)


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers_there_and_back(case, tmp_path):
  model, truth = load(FOLDER / case).model, expected(case)
  assert np.abs(logits(model, truth['tokens']) - truth['logits']).max() < 1e-5
  export(model, tmp_path)
  again, back = open_safetensors(tmp_path), open_safetensors(FOLDER / case)
  # The file holds what it was made of, by the same names.
  assert again.shapes == back.shapes
  for name in back.shapes:
    np.testing.assert_allclose(
      again.read(name), back.read(name), atol=1e-7, err_msg=name
    )
  read = load(tmp_path).model
  assert read.config == model.config


@pytest.mark.parametrize('case', ['llama', 'llama-tied'])
def test_gradients_are_those_of_transformers(case):
  model, truth = load(FOLDER / case).model, expected(case)
  graph, params = nnx.split(model, nnx.Param)
  tokens = jnp.asarray(truth['tokens'], jnp.int32)
  weights = jnp.ones(tokens.shape).at[:, -1].set(0)

  @jax.jit
  def gradient(params):
    sums = nnx.merge(graph, params).loss(
      tokens, jnp.roll(tokens, -1, axis=1), weights
    )
    return sums['loss'] / sums['weight']

  found = flatten(nnx.to_pure_dict(jax.grad(gradient)(params)))
  family = FAMILIES['llama']
  for tensor in family.tensors(model.config):
    parts = [np.asarray(found[path]) for path in tensor.paths]
    theirs = truth[f'gradient {tensor.name}']
    np.testing.assert_allclose(
      tensor.join(parts), theirs, atol=1e-5, err_msg=tensor.name
    )


@pytest.mark.parametrize('case', ['gemma3', 'gpt_neox', 'gpt2', 'phi3'])
def test_cached_logits_are_those_of_the_parallel_pass(case):
  model, truth = load(FOLDER / case).model, expected(case)
  tokens = jnp.asarray(truth['tokens'], jnp.int32)
  cache = cache_lib.init(model, batch_size=2, capacity=32)
  found = []
  for begin, end in ((0, 7), (7, 8), (8, 20)):
    out, cache = cache_lib.extend(model, cache, tokens[:, begin:end])
    found.append(out)
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), truth['logits'], atol=2e-5
  )


def test_parameters_lie_on_a_mesh_as_they_are_read():
  truth = expected('qwen3')
  mesh = make_mesh(data=2, seq=1, model=2)
  model = load(FOLDER / 'qwen3', mesh=mesh, fsdp=True).model
  kernel = model.blocks[0].mlp.up.kernel[...]
  assert kernel.sharding.spec == jax.P(None, 'model')
  assert len(kernel.sharding.device_set) == 4
  assert np.abs(logits(model, truth['tokens']) - truth['logits']).max() < 1e-5


def test_bfloat16_is_the_cast_of_float32():
  exact = load(FOLDER / 'llama').model
  cast = load(FOLDER / 'llama', dtype='bfloat16').model
  for x, y in zip(
    jax.tree.leaves(nnx.state(exact)),
    jax.tree.leaves(nnx.state(cast)),
    strict=True,
  ):
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)


def changed(tmp_path, case='llama', tensors=lambda x: x, **options):
  """A copy of a fixture with other tensors or options."""
  from safetensors.numpy import load_file, save_file

  folder = tmp_path / 'changed'
  shutil.copytree(FOLDER / case, folder)
  config = json.loads((folder / 'config.json').read_text()) | options
  (folder / 'config.json').write_text(json.dumps(config))
  path = folder / 'model.safetensors'
  found = tensors(load_file(path))
  save_file(found, path)
  return folder


@pytest.mark.parametrize(
  ('case', 'options', 'message'),
  [
    ('llama', {'model_type': 'bert'}, "unknown model_type 'bert'"),
    ('llama', {'model_type': 'lama'}, 'did you mean llama'),
    ('llama', {'hidden_act': 'mish'}, "hidden_act='mish' has no equal"),
    ('llama', {'sliding_window': 4}, 'sliding_window=4 has no equal here'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ('llama', {'pretraining_tp': 2}, 'pretraining_tp=2'),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}},
      "rope_type='dynamic' has no equal",
    ),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'wobble': 1}},
      "rope {'wobble': 1} has no equal",
    ),
    ('llama', {'hidden_size': None}, "lacks 'hidden_size'"),
    ('llama', {'num_hidden_layers': 3}, 'lacks the tensor model.layers.2'),
    ('llama', {'num_hidden_layers': 1}, 'nothing here is made of the tensor'),
    ('llama', {'vocab_size': 25}, r'\[24, 16\], and its config asks for \[25'),
    ('llama', {'tie_word_embeddings': True}, 'lm_head.weight is not model'),
    ('llama', {'hidden_size': '16'}, 'of another kind than llama has'),
    ('llama', {'num_attention_heads': 0}, 'of another kind than llama has'),
    ('llama', {'intermediate_size': 0}, 'lacks blocks/0/mlp'),
    ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights=False'),
    ('qwen2', {'layer_types': ['full_attention']}, '1 layer_types'),
  ],
)
def test_what_has_no_equal_is_refused_by_name(case, options, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    load(changed(tmp_path, case, **options))
  assert '\n' not in str(error.value)


def test_missing_and_surplus_tensors_are_named(tmp_path):
  def without(tensors):
    tensors.pop('model.norm.weight')
    return tensors

  with pytest.raises(ValueError, match=r'lacks the tensor model\.norm\.weight'):
    load(changed(tmp_path, tensors=without))
  shutil.rmtree(tmp_path / 'changed')

  def surplus(tensors):
    return {**tensors, 'model.odd': np.ones(2, np.float32)}

  with pytest.raises(ValueError, match=r'made of the tensor model\.odd \[2\]'):
    load(changed(tmp_path, tensors=surplus))


def test_a_base_model_lacks_its_head_by_name(tmp_path):
  def base(tensors):
    tensors.pop('lm_head.weight')
    return {k.removeprefix('model.'): v for k, v in tensors.items()}

  with pytest.raises(ValueError, match=r'lacks the tensor lm_head\.weight'):
    load(changed(tmp_path, tensors=base))


def test_changes_that_need_other_parameters_are_refused():
  with pytest.raises(ValueError, match='has nothing for blocks/0/attention/'):
    load(FOLDER / 'llama', layers=('gla(gate_rank=2)', 'full'))


def test_no_export_is_hidden_by_files_of_another_model(tmp_path):
  (tmp_path / 'model.safetensors.index.json').write_text('{}')
  with pytest.raises(ValueError, match='holds a model of several files'):
    export(load(FOLDER / 'llama').model, tmp_path)


def test_a_model_of_this_package_is_exported_with_its_embedding_scale(tmp_path):
  config = TransformerConfig(
    vocab_size=11, d_model=8, num_heads=2, mlp_dim=12, mlp='swiglu'
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  export(model, tmp_path)
  again = load(tmp_path).model
  assert not again.config.tied_head
  tokens = np.arange(10)[None]
  np.testing.assert_allclose(
    logits(again, tokens), logits(model, tokens), atol=1e-5
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'layers': ('gla', 'full')}, 'no family .* layers='),
    ({'mlp': 'gelu'}, 'no family holds this model'),
    ({'short_conv': 2}, 'short_conv=0'),
    ({'mlp_dim': 0}, 'llama has blocks/0/mlp'),
  ],
)
def test_no_family_is_said_with_the_nearest(changes, message, tmp_path):
  config = dict(
    vocab_size=11,
    d_model=8,
    num_heads=2,
    mlp_dim=12,
    mlp='swiglu',
    embedding_scale=1.0,
  )
  model = Transformer(TransformerConfig(**config | changes), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    export(model, tmp_path)


def test_fixtures_are_small():
  size = sum(p.stat().st_size for p in pathlib.Path(FOLDER).rglob('*.*'))
  assert size < 1_000_000
