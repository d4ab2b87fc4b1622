"""A gate lets the right spans pass, anywhere that a model runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from configs.s2a import get_config
from longctx import parallel
from longctx.analysis.hooks import run_with_hooks
from longctx.decoding import cache
from longctx.decoding.sampler import Generator, Prompts
from longctx.evaluation import streaming, sweep
from longctx.models import Transformer, TransformerConfig, make_model
from longctx.models.gate import GateConfig, choose, ends_of
from longctx.parallel import Placement
from longctx.parallel.layout import SequenceLayout
from longctx.training.config import ExperimentConfig, from_config_dict
from longctx.training.log_files import read_lines
from longctx.training.runs import prepare
from longctx.training.trainer import train
from tests.tiny import tiny_layer

GATE = GateConfig(keep=2, span=3, question=2, answer=2)
T = 21


def make_gated(layers=('sliding_window(window=4)', 'full'), **gate):
  config = TransformerConfig(
    vocab_size=24,
    layers=layers,
    d_model=16,
    num_heads=4,
    gate=dataclasses.replace(GATE, **gate),
  )
  return make_model(config, rngs=nnx.Rngs(0))


def make_batch():
  """Two questions, one of them shorter, with two tokens of answer."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(24, size=(2, T))
  weights = np.zeros((2, T), np.float32)
  weights[0, 19:], weights[1, 15:17] = 1, 1
  relevant = np.zeros((2, T), bool)
  relevant[0, 4:7] = relevant[1, 1:4] = True
  batch = dict(
    tokens=tokens,
    labels=np.roll(tokens, -1, 1),
    weights=weights,
    relevant=relevant,
  )
  return {k: jnp.asarray(v) for k, v in batch.items()}


def test_spans_end_where_scores_are_best_and_the_question_passes():
  scores = jnp.zeros((1, 12)).at[0, [4, 6, 11]].set(jnp.array([8.0, 9, 99]))
  kept = choose(scores, jnp.array([10]), GATE)
  # 4..6 and 2..4 meet; the answer's place, 11, is in no competition.
  assert kept.places.tolist() == [[2, 3, 4, 5, 6, 9, 10, 11, -1]]
  np.testing.assert_array_equal(kept.weights, 1)


def test_a_context_shorter_than_what_may_pass_passes_whole():
  kept = choose(jnp.zeros((1, 5)), jnp.array([3]), GATE)
  assert kept.places.tolist() == [[0, 1, 2, 3, 4]]


def test_the_weight_of_a_span_has_the_gradient_of_its_score():
  def total(scores):
    return choose(scores, jnp.array([10]), GATE).weights.sum()

  scores = jnp.zeros((1, 12)).at[0, [4, 8]].set(2.0)
  slope = jax.grad(total)(scores)[0]
  p = jax.nn.sigmoid(2.0)
  assert np.flatnonzero(slope).tolist() == [4, 8]
  np.testing.assert_allclose(slope[4], 3 * p * (1 - p), rtol=1e-6)


def test_spans_below_the_threshold_do_not_pass():
  gate = dataclasses.replace(GATE, threshold=0.5)
  scores = jnp.full((1, 12), -1.0).at[0, 5].set(0.1)
  kept = choose(scores, jnp.array([10]), gate)
  assert kept.places.tolist() == [[3, 4, 5, 9, 10, 11, -1, -1, -1]]


def test_noise_tries_other_spans():
  gate = dataclasses.replace(GATE, noise=1.0, keep=1, span=1)
  scores = jnp.zeros((1, 12)).at[0, 5].set(1.0)
  tried = {
    int(
      choose(scores, jnp.array([10]), gate, key=jax.random.key(i)).places[0, 0]
    )
    for i in range(40)
  }
  assert 5 in tried and len(tried) > 5
  assert int(choose(scores, jnp.array([10]), gate).places[0, 0]) == 5


@pytest.mark.parametrize(
  ('span', 'ends'), [(1, [2, 3, 4, 5, 8]), (2, [3, 5, 8]), (4, [5, 8])]
)
def test_relevant_runs_are_cut_into_spans_from_their_end(span, ends):
  relevant = (
    jnp.zeros((1, 10), bool).at[0, jnp.array([2, 3, 4, 5, 8])].set(True)
  )
  assert np.flatnonzero(ends_of(relevant, span)[0]).tolist() == ends


def test_a_gate_that_lets_all_pass_changes_nothing():
  batch = make_batch()
  gated = make_gated(keep=T, span=1)
  config = dataclasses.replace(gated.config, gate=GateConfig())
  plain = Transformer(config, rngs=nnx.Rngs(1))
  state = nnx.to_pure_dict(nnx.state(gated))
  del state['gate']
  nnx.update(plain, state)
  out = gated.loss(**batch)
  expected = plain.loss(**batch)
  for name in expected:
    np.testing.assert_allclose(out[name], expected[name], rtol=1e-5)


def losses(model, batch, **options):
  graph, params = nnx.split(model, nnx.Param)

  def loss(params, batch):
    out = nnx.merge(graph, params).loss(**batch, **options)
    return out['loss'] + out['auxiliary'], out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params, batch
  )
  return out, jax.tree.leaves(grads)


@pytest.mark.parametrize('layout', ['contiguous', 'zigzag', 'striped'])
def test_a_gate_on_a_mesh_is_the_gate_on_one_device(layout):
  model, batch = make_gated(), make_batch()
  expected, slopes = losses(model, batch)
  mesh = parallel.make_mesh(data=2, seq=4)
  placement = Placement(mesh, SequenceLayout(layout, T, 4), 'ring')
  placed = placement.put({k: np.asarray(v) for k, v in batch.items()})
  found, on_mesh = losses(model, placed, placement=placement)
  assert found.keys() == expected.keys()
  for name in found:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
  for x, y in zip(on_mesh, slopes, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize(
  ('variant', 'devices'),
  [
    ('full', 1),
    ('full', 4),
    ('sliding_window', 1),
    ('streaming', 4),
    ('gated_deltanet', 4),
    ('moba', 1),
  ],
)
def test_decoding_continues_as_the_loss_would(variant, devices):
  """Ragged prompts in chunks, then two tokens of answer."""
  model = make_gated(('sliding_window(window=4)', tiny_layer(variant)))
  batch = make_batch()
  tokens = np.asarray(batch['tokens'])
  prompts = Prompts.of([tokens[0, :20], tokens[1, :16]])
  mesh = None if devices == 1 else parallel.make_mesh(seq=devices)
  generator = Generator(model, capacity=24, chunk=8, mesh=mesh, max_new=4)
  stream = generator.start(prompts)
  first = np.asarray(stream.logits)
  _, drawn = generator.draw(stream, jax.random.key(0), 2)
  rows = np.arange(2)
  tokens = tokens.copy()
  tokens[0, 20], tokens[1, 16] = np.asarray(drawn)[:, 0]
  for later in (0, 1):
    # Answers begin where they did, and one of their tokens counts.
    weights, labels = np.zeros((2, T), np.float32), np.zeros((2, T), int)
    weights[rows, [19, 15]] = 1e-9
    weights[rows, np.array([19, 15]) + later] = 1
    labels[rows, np.array([19, 15]) + later] = np.asarray(drawn)[:, later]
    out = model.loss(*map(jnp.asarray, (tokens, labels, weights)))
    np.testing.assert_allclose(out['correct'], 2, atol=1e-4)
    if not later:
      nll = -jax.nn.log_softmax(first)[rows, np.asarray(drawn)[:, 0]].sum()
      np.testing.assert_allclose(out['loss'], nll, rtol=1e-4)


def test_a_trained_gate_logs_what_it_keeps(tmp_path):
  """From the config to metrics.jsonl and eval.jsonl, with accumulation."""
  config = get_config('gate')
  config.steps, config.batch_size = 4, 4
  config.optimizer.warmup_steps, config.optimizer.accumulation = 1, 2
  config.eval.update(every=2, batches=1, test_batches=1)
  config.task.update(seq_len=64, num_facts=2)
  config = from_config_dict(ExperimentConfig, config)
  train(prepare(config, tmp_path), tmp_path)
  lines = read_lines(tmp_path / 'gate' / 'metrics.jsonl')
  measured = [row for row in lines if row['split'] == 'validation']
  runs = sweep.open_workdir(tmp_path)
  rows = sweep.evaluate(runs, tmp_path, sweep=sweep.parse_sweep(''), batches=1)
  for row in (*measured, *rows):
    assert 0 <= row['precision'] <= 1 and 0 <= row['recall'] <= 1
  with pytest.raises(NotImplementedError, match='gate chooses once'):
    streaming.check(runs[0], streaming.StreamConfig(tokens=64))


def gated(task='passkey', *, model=None, **overrides):
  base = {'keep': 1, 'question': 1, 'answer': 5, 'labels': 0.0}
  config = default.get_config(task)
  config.model.gate.update({**base, **(model or {})})
  config.update(overrides)
  return from_config_dict(ExperimentConfig, config)


@pytest.mark.parametrize(
  ('config', 'error', 'message'),
  [
    (
      lambda: gated('mqar'),
      ValueError,
      'gate.answer=5 is too small for answers that take',
    ),
    (
      lambda: gated(model={'labels': 1.0}),
      ValueError,
      'does not tell what is relevant',
    ),
    (
      lambda: gated(analysis={'every': 5}),
      NotImplementedError,
      'analysis.every=5',
    ),
    (
      lambda: gated(model={'after': 2}),
      ValueError,
      'gate.after=2 leaves no block above the gate',
    ),
    (
      lambda: gated(model={'threshold': 0.5}),
      ValueError,
      'gate.threshold=0.5 is a probability',
    ),
  ],
)
def test_what_a_gate_cannot_do_is_refused(config, error, message, tmp_path):
  with pytest.raises(error, match=message):
    prepare(config(), tmp_path)


def test_a_gated_model_is_no_plain_one():
  model = make_gated()
  tokens = make_batch()['tokens']
  with pytest.raises(NotImplementedError, match='take `loss`'):
    model(tokens)
  with pytest.raises(NotImplementedError, match='gated_cache'):
    cache.init(model, batch_size=1, capacity=8)
  with pytest.raises(NotImplementedError, match=r'gate\.keep=0'):
    run_with_hooks(model, tokens, lambda *site: site[1](site[2]))
  with pytest.raises(NotImplementedError, match='one question per row'):
    model.loss(**make_batch(), segment_ids=tokens * 0)
  with pytest.raises(ValueError, match=r'gate\.keep=2 is not of a Transformer'):
    Transformer(model.config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='give a capacity'):
    Generator(model)
  generator = Generator(model, capacity=24, max_new=2)
  running = generator.start(Prompts.of([[1, 2, 3]]))
  with pytest.raises(ValueError, match='3 tokens are more than the max_new=2'):
    generator.draw(running, jax.random.key(0), 3)
