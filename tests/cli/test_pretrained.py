"""Pretrained models by commands: a workdir, text, training, and back."""

import jax
import numpy as np
import pytest
from flax import nnx

from longctx.cli import flags
from longctx.models import Transformer, TransformerConfig
from longctx.pretrained import export, load
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer('import os')


def make_source(folder, tokenizer=TOKENIZER):
  """A tiny model of Llama's kind, as other people's."""
  config = TransformerConfig(
    vocab_size=280,
    d_model=16,
    num_heads=2,
    mlp_dim=24,
    mlp='swiglu',
    embedding_scale=1.0,
  )
  model = Transformer(config, rngs=nnx.Rngs(0))
  return export(model, folder, tokenizer=tokenizer)


def leaves(source):
  return jax.tree.leaves(nnx.state(load(source).model))


def test_a_workdir_at_step_0_writes_trains_and_is_exported(tmp_path, capsys):
  source, workdir = make_source(tmp_path / 'llama'), tmp_path / 'run'
  place = f'--workdir={workdir}'
  command = ['pretrained', 'import', str(source), place, '--seq_len=16']
  assert flags.main([*command, '--model.rope_scaling=linear(factor=2.0)']) == 0
  said = capsys.readouterr().err
  assert 'takes 20 arrays' in said and "'none' -> 'linear(factor=2.0)'" in said
  generate = ['generate', place, '--prompt=import os', '--temperature=0']
  assert flags.main([*generate, '--max_new=3']) == 0
  assert capsys.readouterr().out.startswith('import os')
  # As a terminal hands on a byte that is no UTF-8.
  with pytest.raises(SystemExit):
    flags.main(['generate', place, '--prompt=\udcff'])
  said = capsys.readouterr().err
  assert 'the prompt is no text in UTF-8' in said and said.count('\n') == 1
  assert flags.main(['eval', place, '--batches=1', '--batch_size=2']) == 0
  out = tmp_path / 'out'
  assert flags.main(['pretrained', 'export', place, f'--out={out}']) == 0
  old, new = load(source), load(out)
  assert old.tokenizer.digest == new.tokenizer.digest
  assert new.model.config.rope_scaling == 'linear(factor=2.0)'
  for x, y in zip(leaves(source), leaves(out), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['import', 'nowhere'], 'nowhere is no file or folder'),
    (['import'], 'required: SOURCE'),
    (['import', 'smollm3'], 'smollm3'),
    (['import', 'SOURCE', '--model.rope_bse=1'], 'did you mean rope_base'),
    (['import', 'SOURCE', '--model.d_model=32'], 'asks for'),
    (['fetch', 'gpt5'], "unknown model 'gpt5'"),
    (['export', '--out=x'], 'config.json'),
  ],
)
def test_what_cannot_be_is_one_line(words, message, tmp_path, capsys):
  source = str(make_source(tmp_path / 'llama'))
  words = [source if word == 'SOURCE' else word for word in words]
  if words[0] != 'fetch':
    words.append(f'--workdir={tmp_path / "run"}')
  with pytest.raises(SystemExit) as ended:
    flags.main(['pretrained', *words])
  said = capsys.readouterr().err
  assert ended.value.code == 2
  assert (
    message in said and said.startswith('error: ') and said.count('\n') == 1
  )


def test_a_source_without_a_tokenizer_is_refused(tmp_path, capsys):
  source = make_source(tmp_path / 'llama', tokenizer=None)
  with pytest.raises(SystemExit):
    flags.main(['pretrained', 'import', str(source), f'--workdir={tmp_path}/r'])
  assert 'has no tokenizer.json' in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
  text = ' '.join(f'word{i}' for i in range(200))
  large = tiny_tokenizer(text, vocab_size=400)
  source = make_source(tmp_path / 'llama', tokenizer=large)
  with pytest.raises(ValueError, match='its model a vocabulary of 280'):
    load(source)
