"""Streams: what is measured is the model under a policy's mask."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.data.token_stream import TokenStream
from longctx.evaluation import streaming, sweep
from longctx.evaluation.streaming import StreamConfig, evaluate_stream
from longctx.tasks.bytes_lm import BOS
from longctx.training import log_files, runs, steps, trainer
from tests.tiny import tiny_config

CONFIG = StreamConfig(
  tokens=48, slots=6, sinks=2, chunk=8, bucket=16, rows=2, recomputed=3
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A model of bytes after some steps."""
  text = tmp_path_factory.mktemp('text') / 'text.txt'
  words = np.random.default_rng(0).choice([b'one ', b'two ', b'six. '], 3000)
  text.write_bytes(b''.join(words))
  folder = tmp_path_factory.mktemp('run')
  config = tiny_config(
    batch_size=4,
    task=dict(name='bytes_lm', path=str(text), seq_len=16),
    model=dict(layers=('full', 'full'), short_conv=2, position_encoding='rope'),
  )
  trainer.train(runs.prepare(config, folder), folder)
  return sweep.choose(sweep.open_workdir(folder), '')


def losses(run, policy, config):
  """Nats of every token, from the whole rows at once."""
  learned = sweep.restore(run)
  changed = streaming.with_policy(run.model, policy, config)
  graph, _ = steps.abstract_params(changed)
  model = nnx.merge(graph, learned.params)
  piece = TokenStream(
    task=run.task, split='test', seed=0, rows=config.rows
  ).take(0, config.tokens)
  logits = jax.jit(lambda tokens: model(tokens))(jnp.asarray(piece.tokens))
  logp = np.asarray(jax.nn.log_softmax(logits))
  return -np.take_along_axis(logp, piece.labels[..., None], -1)[..., 0]


@pytest.mark.parametrize('policy', ['dense', 'window', 'sinks', 'sinks_text'])
def test_buckets_are_the_losses_under_the_mask(run, policy):
  config = dataclasses.replace(CONFIG, policies=(policy,), dense_tokens=48)
  rows = evaluate_stream(run, config)[policy]
  expected = losses(run, policy, config)
  assert [(row['begin'], row['end']) for row in rows] == [
    (0, 8),
    (8, 16),
    (16, 32),
    (32, 48),
  ]
  for row in rows:
    part = expected[:, row['begin'] : row['end']]
    np.testing.assert_allclose(row['loss'], part.mean(), rtol=1e-4)
    assert row['count'] == part.size
  assert (run.workdir / 'figures' / 'stream.png').stat().st_size > 5000


def test_a_layer_keeps_the_arguments_of_its_own(run):
  layers = ("full(position_encoding='none')", 'linear')
  model = dataclasses.replace(run.model, layers=layers)
  changed = streaming.with_policy(model, 'window', CONFIG)
  assert changed.layers == (
    "sliding_window(position_encoding='none', window=6)",
    'linear',
  )


def test_windows_read_anew_know_nothing_of_what_left(run):
  config = dataclasses.replace(CONFIG, policies=('recompute',))
  rows = evaluate_stream(run, config)['recompute']
  learned = sweep.restore(run)
  model = nnx.merge(learned.graph, learned.params)
  tokens = TokenStream(task=run.task, split='test', seed=0, rows=2)
  found = []
  for at in (32, 39, 47):
    piece = tokens.take(at - 5, 6)
    logp = jax.nn.log_softmax(model(jnp.asarray(piece.tokens))[:, -1])
    found.append(-np.take_along_axis(logp, piece.labels[:, -1:], -1))
  assert rows[-1]['count'] == 6
  np.testing.assert_allclose(rows[-1]['loss'], np.mean(found), rtol=1e-4)


def test_a_stream_goes_on_where_it_stopped(run):
  config = dataclasses.replace(CONFIG, policies=('sinks',), slots=7)
  whole = evaluate_stream(run, config)['sinks']
  (run.workdir / 'stream' / 'sinks.npz').unlink()
  for tokens in (24, 30, 48):
    part = dataclasses.replace(config, tokens=tokens)
    rows = evaluate_stream(run, part)['sinks']
  assert [row['end'] for row in rows] == [8, 16, 24, 32, 48]
  assert rows[-1]['loss'] == whole[-1]['loss']
  both = np.mean([row['loss'] for row in rows[2:4]])
  np.testing.assert_allclose(both, whole[2]['loss'], rtol=1e-5)
  lines = log_files.read_lines(run.workdir / 'stream.jsonl')
  assert [row for row in lines if row['policy'] == 'sinks'] == rows


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def change_leaf(path):
  """Other numbers in the cache, in a file that is whole."""
  with np.load(path) as saved:
    arrays = dict(saved)
  arrays['leaf1'] = arrays['leaf1'][::-1]
  np.savez(path, **arrays)


def without_seconds(rows):
  drop = ('seconds', 'peak_memory')
  return [{k: v for k, v in row.items() if k not in drop} for row in rows]


@pytest.fixture(scope='module')
def streamed(run):
  """The lines of a stream that nothing befell."""
  config = dataclasses.replace(CONFIG, policies=('sinks',), slots=5)
  rows = evaluate_stream(run, config)['sinks']
  shutil.rmtree(run.workdir / 'stream')
  (run.workdir / 'stream.jsonl').unlink()
  return config, without_seconds(rows)


@pytest.mark.parametrize(
  'harm', [flip, change_leaf, Path.unlink, 'cut', 'lost']
)
def test_a_stream_whose_files_disagree_ends_like_any_other(
  run, streamed, harm, capsys
):
  config, whole = streamed
  lines, state = run.workdir / 'stream.jsonl', run.workdir / 'stream/sinks.npz'
  lines.unlink(missing_ok=True)
  state.unlink(missing_ok=True)
  evaluate_stream(run, dataclasses.replace(config, tokens=32))
  capsys.readouterr()
  if harm == 'cut':
    lines.write_bytes(lines.read_bytes()[:-300])
  elif harm == 'lost':
    lines.unlink()
  else:
    harm(state)
  rows = evaluate_stream(run, config)['sinks']
  assert without_seconds(rows) == whole
  found = [r for r in log_files.read_lines(lines) if r['policy'] == 'sinks']
  assert without_seconds(found) == whole
  said = capsys.readouterr().err
  if harm in ('cut', 'lost'):
    assert f'{1 if harm == "cut" else 3} lines are written again' in said
  else:
    assert f'{state} is ' in said
    assert '3 lines are moved to stream.jsonl.old' in said


def test_lines_of_other_settings_are_kept_beside(run, capsys):
  config = dataclasses.replace(CONFIG, policies=('recompute',), tokens=16)
  rows = evaluate_stream(run, config)['recompute']
  evaluate_stream(run, dataclasses.replace(config, recomputed=2))
  assert 'its settings are others' in capsys.readouterr().err
  old = log_files.read_lines(run.workdir / 'stream.jsonl.old')
  assert [row for row in old if row in rows] == rows


def test_a_stream_of_bfloat16_goes_on(run, tmp_path):
  config = dataclasses.replace(
    run.config,
    model=dataclasses.replace(
      run.config.model, dtype='bfloat16', param_dtype='bfloat16'
    ),
  )
  trainer.train(runs.prepare(config, tmp_path), tmp_path)
  half = sweep.choose(sweep.open_workdir(tmp_path), '')
  config = dataclasses.replace(CONFIG, policies=('sinks',))
  whole = without_seconds(evaluate_stream(half, config)['sinks'])
  shutil.rmtree(tmp_path / 'stream')
  evaluate_stream(half, dataclasses.replace(config, tokens=32))
  assert without_seconds(evaluate_stream(half, config)['sinks']) == whole


def test_text_begins_anew_where_it_ends(run):
  tokens = TokenStream(task=run.task, split='test', seed=0, rows=2)
  length = len(run.task.text('test'))
  first, later = tokens.take(3, 20), tokens.take(3 + length, 20)
  np.testing.assert_array_equal(first.tokens, later.tokens)
  np.testing.assert_array_equal(first.tokens[:, 1:], first.labels[:, :-1])


def test_a_stream_begins_with_bos_where_windows_do(run):
  task = dataclasses.replace(run.task, prepend_bos=True)
  tokens = TokenStream(task=task, split='test', seed=0, rows=2)
  for piece in (tokens.take(0, 4), tokens.take(7, 4, anew=True)):
    assert (piece.tokens[:, 0] == BOS).all()
  assert (tokens.take(7, 4).tokens != BOS).all()


def test_other_tasks_are_read_example_after_example(tmp_path):
  config = tiny_config(steps=2)
  trainer.train(runs.prepare(config, tmp_path), tmp_path)
  run = sweep.choose(sweep.open_workdir(tmp_path), '')
  tokens = TokenStream(task=run.task, split='test', seed=0, rows=2)
  T = run.task.seq_len
  piece = tokens.take(T - 3, T + 5)
  for row in range(2):
    examples = [run.task.get(0, 'test', 2 * i + row) for i in range(3)]
    joined = np.concatenate([e.labels for e in examples])
    np.testing.assert_array_equal(piece.labels[row], joined[T - 3 : 2 * T + 2])
  rows = evaluate_stream(run, CONFIG)['window']
  assert all(row['count'] > 0 for row in rows)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: StreamConfig(tokens=0), 'tokens=0 must be'),
    (
      lambda: StreamConfig(tokens=1, policies=('none',)),
      r"unknown policies.0.='none'",
    ),
    (lambda: StreamConfig(tokens=1, slots=4, sinks=4), 'sinks=4 must be fewer'),
    (lambda: StreamConfig(tokens=1, chunk=3), 'must be a multiple of chunk=3'),
  ],
)
def test_wrong_arguments_are_named(build, message):
  with pytest.raises(ValueError, match=message):
    build()


@pytest.mark.parametrize(
  ('layers', 'policy', 'message'),
  [
    (('linear',), 'sinks', "take 'trained'"),
    (('full',), 'trained', 'give a capacity'),
  ],
)
def test_what_does_not_fit_the_model_is_refused(run, layers, policy, message):
  model = dataclasses.replace(run.model, layers=layers)
  other = dataclasses.replace(run, model=model)
  with pytest.raises(ValueError, match=message):
    streaming.check(other, dataclasses.replace(CONFIG, policies=(policy,)))
