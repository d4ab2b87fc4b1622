"""Generation: what is drawn follows from the model's logits on the row."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import parallel
from longctx.cli import flags
from longctx.decoding.sampler import (
  GREEDY,
  Generator,
  Prompts,
  Sampling,
  sample,
)
from longctx.models.transformer import Transformer, TransformerConfig
from longctx.training import runs, trainer
from tests.tiny import tiny_config

V = 11
CONFIG = TransformerConfig(
  vocab_size=V,
  d_model=16,
  num_heads=2,
  layers=('full', 'gated_deltanet(chunk_size=4)'),
)
PROMPTS = Prompts.of([[1, 2, 3, 4, 5, 6, 7], [3, 9], [5, 5, 5, 1]])
NEW = 6


def make_model(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return Transformer(config, rngs=nnx.Rngs(0))


def one_by_one(model, prompt):
  """Greedy tokens from the whole row, made anew for each."""
  run = jax.jit(lambda tokens: model(tokens))
  row = [*prompt, *[0] * NEW]
  for t in range(len(prompt), len(row)):
    # Causal: what comes later does not count.
    row[t] = int(run(jnp.array([row]))[0, t - 1].argmax())
  return row[len(prompt) :]


def collect(generator, key=None, **options):
  key = jax.random.key(0) if key is None else key
  parts = generator.generate(PROMPTS, key, max_new=NEW, **options)
  return np.concatenate(list(parts), axis=1)


@pytest.mark.parametrize('chunk', [1, 3, 16])
def test_greedy_tokens_are_those_of_the_whole_row(chunk):
  model = make_model()
  tokens = collect(Generator(model, capacity=7 + NEW, chunk=chunk))
  for row, length, found in zip(*PROMPTS, tokens, strict=True):
    assert found.tolist() == one_by_one(model, row[:length].tolist())


@pytest.mark.parametrize(
  'mesh', [dict(seq=8), dict(data=3, model=2)], ids=['seq', 'data-model']
)
def test_a_mesh_draws_the_same_tokens(mesh):
  mesh = parallel.make_mesh(**mesh)
  generator = Generator(make_model(), capacity=16, chunk=8, mesh=mesh)
  np.testing.assert_array_equal(
    collect(generator), collect(Generator(make_model(), capacity=16))
  )


def test_a_key_draws_the_same_tokens_any_number_at_a_time():
  generator = Generator(make_model(), capacity=16, sampling=Sampling())
  several, single = collect(generator), collect(generator, at_once=1)
  np.testing.assert_array_equal(several, single)
  assert (several != collect(generator, jax.random.key(1))).any()


def test_a_stop_token_ends_its_row_and_no_other():
  model = make_model()
  free = collect(Generator(model, capacity=16))
  stop = int(free[1, 2])
  stopped = collect(Generator(model, capacity=16, stop_tokens=(stop,)))
  for before, after in zip(free, stopped, strict=True):
    ends = np.flatnonzero(before == stop)
    end = ends[0] + 1 if ends.size else NEW
    np.testing.assert_array_equal(after[:end], before[:end])
    assert (after[end:] == -1).all()


def test_generation_ends_when_all_rows_have():
  model = make_model()
  generator = Generator(model, capacity=99, stop_tokens=tuple(range(V)))
  parts = generator.generate(PROMPTS, jax.random.key(0), max_new=90, at_once=2)
  assert [part.shape for part in parts] == [(3, 2)]


def shares(logits, sampling, draws=4000):
  keys = jax.random.split(jax.random.key(0), draws)
  drawn = jax.vmap(lambda key: sample(logits[None], sampling, key)[0])(keys)
  return np.bincount(np.asarray(drawn), minlength=len(logits)) / draws


def test_sampling_draws_by_the_filtered_probabilities():
  p = np.array([0.1, 0.4, 0.2, 0.3])
  logits = jnp.log(p)
  close = dict(atol=0.03)
  np.testing.assert_allclose(shares(logits, Sampling()), p, **close)
  two = np.array([0, 4 / 7, 0, 3 / 7])
  for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
    np.testing.assert_allclose(shares(logits, sampling), two, **close)
  # 0.4 has not reached 0.41, so the next one stays; the third does not.
  np.testing.assert_allclose(shares(logits, Sampling(top_p=0.41)), two, **close)
  sharp = p**2 / (p**2).sum()
  halved = Sampling(temperature=0.5)
  np.testing.assert_allclose(shares(logits, halved), sharp, **close)
  assert sample(logits[None], GREEDY, jax.random.key(0)).tolist() == [1]


def test_the_coldest_temperature_takes_the_likeliest():
  logits = jnp.array([[3e4, 3e4 - 1, -3e4, 0.0]])
  sampling = Sampling(temperature=1e-6)
  keys = jax.random.split(jax.random.key(0), 20)
  assert {int(sample(logits, sampling, key)[0]) for key in keys} == {0}


@pytest.mark.parametrize('sampling', [GREEDY, Sampling(temperature=99.0)])
def test_padding_of_the_vocabulary_is_never_drawn(sampling):
  options = dict(capacity=16, sampling=sampling)
  free = collect(Generator(make_model(), **options))
  assert (free >= 3).any()
  tokens = collect(Generator(make_model(), num_tokens=3, **options))
  assert set(np.unique(tokens)) <= {0, 1, 2}


def test_a_stream_without_end_goes_on_beyond_any_window():
  layers = ('streaming(num_sinks=1, window=3)', 'linear')
  model = make_model(layers=layers)
  generator = Generator(model, chunk=4)
  tokens = collect(generator)
  for row, length, found in zip(*PROMPTS, tokens, strict=True):
    assert found.tolist() == one_by_one(model, row[:length].tolist())


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: Prompts.of([[1], []]), 'each needs one, such as BOS'),
    (lambda: Prompts.of([]), 'each needs one'),
    *(
      (lambda t=t: Sampling(temperature=t), f'temperature={t} must be 0, for')
      for t in (-1.0, 1e-45, 1e-7, float('inf'), float('nan'))
    ),
    (lambda: Sampling(top_p=float('nan')), 'top_p=nan must be'),
    (lambda: Generator(make_model(), num_tokens=V + 1), 'from 1 to vocab_size'),
    (lambda: Sampling(top_p=0.0), r'top_p=0.0 must be in \(0, 1\]'),
    (lambda: Sampling(top_k=-1), 'top_k=-1 must not'),
    (lambda: Generator(make_model(), chunk=0), 'chunk=0 must be'),
    (
      lambda: Generator(make_model(), capacity=6).start(PROMPTS),
      'the longest prompt has 7 tokens, and capacity=6: raise it',
    ),
    (
      lambda: collect(Generator(make_model(), capacity=9)),
      'a row has 13 tokens, and capacity=9',
    ),
    (lambda: Generator(make_model()).start(PROMPTS), 'give a capacity'),
  ],
)
def test_what_cannot_be_generated_says_what_to_change(build, message):
  with pytest.raises(ValueError, match=message):
    build()


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A model of bytes after one step."""
  text = tmp_path_factory.mktemp('text') / 'text.txt'
  text.write_bytes(bytes(range(256)) * 40)
  folder = tmp_path_factory.mktemp('run')
  config = tiny_config(
    steps=1,
    batch_size=1,
    task=dict(name='bytes_lm', path=str(text), seq_len=16),
  )
  trainer.train(runs.prepare(config, folder), folder)
  return folder


def test_command_continues_a_text(workdir, capfdbinary):
  command = [f'--workdir={workdir}', '--prompt=ab', '--max_new=5']
  written = []
  for seed in (0, 0, 1):
    flags.run('generate', [*command, f'--seed={seed}'])
    written.append(capfdbinary.readouterr().out)
  assert written[0] == written[1] != written[2]
  assert all(text.startswith(b'ab') for text in written)
  assert len(written[0]) == 2 + 5 + 1
  flags.run('generate', [*command, '--devices=2'])
  assert capfdbinary.readouterr().out == written[0]


@pytest.mark.parametrize(
  ('file', 'fields', 'starts'),
  [
    (True, {}, False),
    (True, {'prepend_bos': True}, True),
    (False, {}, True),
  ],
  ids=['file', 'file-bos', 'folder'],
)
def test_generation_begins_as_training_did(
  file, fields, starts, tmp_path, monkeypatch
):
  text = tmp_path / 'text'
  text.mkdir()
  for i in range(40):
    (text / str(i)).write_bytes(b'%d' % i + b' of all words ' * 20)
  path = text / '0' if file else text
  config = tiny_config(
    steps=1,
    batch_size=1,
    task=dict(name='bytes_lm', path=str(path), seq_len=16, **fields),
    model=dict(vocab_size=300),
  )
  folder = tmp_path / 'run'
  (run,) = runs.prepare(config, folder)
  trainer.train([run], folder)
  read = []
  monkeypatch.setattr(
    Generator, 'start', lambda self, prompts: read.append(prompts.tokens)
  )
  module = importlib.import_module('longctx.cli.generate')
  module.prepare(
    flags.parse('generate', [f'--workdir={folder}', '--prompt=of all'])
  )
  np.testing.assert_array_equal(read[0][0], [*[256] * starts, *b'of all'])
  windows = [run.task.get(0, 'train', i).tokens for i in range(9)]
  assert any((window == 256).any() for window in windows) == starts


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--prompt=a', '--temperature=nan'], 'temperature=nan must be 0, for'),
    (['--prompt=a', '--temperature=1e-45'], 'temperature=1e-45 must be 0, for'),
    (['--prompt='], 'the prompt is empty'),
    (['--prompt=a', '--run=b'], "there is no run 'b'"),
    (['--prompt=a', '--max_new=0'], '--max_new=0 must be at least 1'),
    (['--prompt=a', '--devices=0'], '--devices=0 must be at least 1'),
    (['--prompt=a', '--devices=99'], '99 devices'),
    (['--prompt=a', '--top_p=2'], 'top_p=2.0 must be in'),
    (['--prompt=a', '--workdir=/nowhere'], '/nowhere is no workdir'),
  ],
)
def test_command_ends_with_one_line(workdir, options, message, capsys):
  with pytest.raises(SystemExit) as end:
    flags.run('generate', [f'--workdir={workdir}', *options])
  assert end.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error
  assert error.count('\n') == 1
