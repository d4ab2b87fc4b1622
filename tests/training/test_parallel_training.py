"""The same losses on any mesh, layout and scheme, and in several processes."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from longctx import tasks
from longctx.models.transformer import TransformerConfig
from longctx.training import config as config_lib
from longctx.training import runs, steps, trainer
from longctx.training.config import ExperimentConfig, ParallelConfig
from tests.tiny import tiny_config
from tests.training.test_trainer import ROOT

STEPS = 50


def experiment(layers, **parallel):
  """50 steps of two rows of 61 tokens, an odd length, with dropout."""
  linear = 'linear' in ' '.join(layers)
  return ExperimentConfig(
    steps=STEPS,
    batch_size=2,
    task=tasks.task_defaults('copying', seq_len=61),
    model=TransformerConfig(
      layers=layers,
      d_model=16,
      num_heads=8,
      num_kv_heads=4,
      mlp_dim=32,
      short_conv=3 if linear else 0,
      attention_dropout=0.0 if linear else 0.2,
      logits_chunk=16,
    ),
    optimizer=config_lib.OptimizerConfig(learning_rate=1e-3),
    parallel=ParallelConfig(**parallel),
  )


@functools.lru_cache
def losses(layers, **parallel):
  """The loss of every step."""
  config = experiment(layers, **parallel)
  task = tasks.make_task(**config.task)
  model = runs.resolve_model(config.model, task)
  placement = runs.make_placement(config.parallel, task.seq_len)
  graph, _ = steps.abstract_params(model)
  state = steps.init_state(model, config, placement=placement)
  update = steps.make_steps(graph, config, placement=placement).train
  found = []
  with contextlib.closing(
    runs.open_batches(config, task, 'train', placement=placement)
  ) as batches:
    for step, batch in zip(range(1, STEPS + 1), batches, strict=False):
      state, values = update(state, steps.put(batch, placement), np.int32(step))
      found.append(float(values['loss'] / values['weight']))
  return np.array(found)


SOFTMAX = ('full', 'sliding_window(window=9)')
MESHES = [
  dict(seq=2),
  dict(seq=4),
  dict(seq=8),
  dict(seq=8, layout='contiguous'),
  dict(seq=8, layout='striped'),
  dict(seq=4, scheme='ulysses', data=2),
  dict(seq=8, scheme='all_gather'),
  dict(seq=4, model=2, scheme='ring+ulysses'),
  dict(data=2, seq=2, model=2, fsdp=True),
]


@pytest.mark.parametrize(
  'mesh',
  # The last one has every axis and shards the parameters too.
  [*(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[:-1]), MESHES[-1]],
  ids=str,
)
def test_every_mesh_trains_to_the_same_loss_with_dropout(mesh):
  np.testing.assert_allclose(
    losses(SOFTMAX, **mesh), losses(SOFTMAX), rtol=1e-5
  )


@pytest.mark.parametrize(
  'mesh',
  [
    pytest.param(dict(seq=8), marks=pytest.mark.slow),
    dict(data=2, seq=2, model=2),
  ],
  ids=str,
)
def test_recurrent_layers_train_to_the_same_loss_on_a_mesh(mesh):
  layers = ('linear', 'full')
  np.testing.assert_allclose(losses(layers, **mesh), losses(layers), rtol=1e-5)


def test_run_continues_on_another_mesh(tmp_path):
  for seq, steps_so_far in ((2, 5), (1, 10)):
    config = tiny_config(
      steps=steps_so_far,
      parallel=dict(seq=seq),
      log=dict(every=1),
      optimizer=dict(schedule_steps=10),
    )
    trainer.train(runs.prepare(config, tmp_path), tmp_path)
  rows = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  trained = [row['step'] for row in rows if row['split'] == 'train']
  assert trained == list(range(1, 11))


CANNOT_WORK = [
  ('no-such-scheme', dict(parallel=dict(seq=2, scheme='star')), ValueError),
  ('no-such-layout', dict(parallel=dict(seq=2, layout='spiral')), ValueError),
  ('mesh-larger-than-the-machine', dict(parallel=dict(seq=16)), ValueError),
  ('rows-over-data', dict(batch_size=3, parallel=dict(data=2)), ValueError),
  (
    'rows-of-a-slice-over-data',
    dict(optimizer=dict(accumulation=2), parallel=dict(data=2)),
    ValueError,
  ),
  (
    'heads-over-model',
    dict(model=dict(num_kv_heads=1), parallel=dict(model=2)),
    ValueError,
  ),
  (
    'ulysses-without-heads',
    dict(model=dict(num_heads=4), parallel=dict(seq=8, scheme='ulysses')),
    ValueError,
  ),
  (
    'ring+ulysses-without-heads',
    dict(
      model=dict(num_heads=4),
      parallel=dict(model=8, scheme='ring+ulysses'),
    ),
    ValueError,
  ),
  (
    'ring-of-the-reference',
    dict(model=dict(implementation='reference'), parallel=dict(seq=2)),
    NotImplementedError,
  ),
  (
    'striped-recurrence',
    dict(
      model=dict(layers=('linear',), attention_dropout=0.0),
      parallel=dict(seq=2, layout='striped'),
    ),
    NotImplementedError,
  ),
  (
    'dropout-of-a-recurrence',
    dict(model=dict(layers=('linear',))),
    NotImplementedError,
  ),
  (
    'convolution-wider-than-a-run',
    dict(model=dict(short_conv=6), parallel=dict(seq=8)),
    ValueError,
  ),
]


@pytest.mark.parametrize(
  ('overrides', 'error'),
  [case[1:] for case in CANNOT_WORK],
  ids=[case[0] for case in CANNOT_WORK],
)
def test_what_cannot_work_is_refused_when_the_config_is_read(
  overrides, error, tmp_path
):
  base = config_lib.to_dict(experiment(SOFTMAX))
  with pytest.raises(error):
    config = config_lib.from_config_dict(
      ExperimentConfig, {**base, 'runs': {'run': overrides}}
    )
    runs.prepare(config, tmp_path)


def train_sibling(workdir, *options):
  """The command that trains ring_1m's small sibling for a few steps."""
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    '--config=configs/ring_1m.py:sibling',
    f'--workdir={workdir}',
    '--config.steps=6',
    '--config.task.seq_len=250',
    '--config.parallel.data=2',
    '--config.parallel.seq=2',
    *options,
  ]


def start(command):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def logged(workdir, *splits):
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [row for row in rows if row['split'] in splits]


def logged_losses(workdir):
  return [row['loss'] for row in logged(workdir, 'train', 'validation')]


@pytest.fixture(scope='module')
def sibling_losses(tmp_path_factory):
  """What one process logs."""
  workdir = tmp_path_factory.mktemp('one')
  process = start(train_sibling(workdir))
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  assert '4 virtual devices' in output
  return logged_losses(workdir)


@pytest.mark.parametrize(
  'processes', [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_several_processes_train_to_the_same_loss(
  processes, sibling_losses, tmp_path
):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  # Heads lie on several processes, and each reads the scores of all.
  analysis = ['--config.analysis.every=100'] if processes == 2 else []
  running = [
    start(
      train_sibling(
        tmp_path,
        *analysis,
        f'--coordinator=localhost:{port}',
        f'--num_processes={processes}',
        f'--process_id={index}',
      )
    )
    for index in range(processes)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [p.returncode for p in running] == [0] * processes, outputs
  np.testing.assert_allclose(logged_losses(tmp_path), sibling_losses, rtol=1e-5)
  rows = logged(tmp_path, 'analysis', 'ablation')
  assert [row['split'] for row in rows] == ['analysis', 'ablation'] * bool(
    analysis
  )
