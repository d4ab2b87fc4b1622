"""Every experiment in configs/ is built, checked and stepped once."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from longctx.cli.config_file import load_config_file
from longctx.training import runs, steps
from longctx.training.config import ExperimentConfig, from_config_dict
from tests.tiny import tiny_tokenizer
from tests.training.test_trainer import ROOT

# 'file:argument' for configs whose get_config takes one, and 'file' for all.
SPECS = sorted(path.stem for path in (ROOT / 'configs').glob('[a-z]*.py'))
ARGUMENTS = (
  'default:copying',
  'mqar:linear',
  'copying:full',
  'induction:1',
  'smollm2:extend',
  'smollm2:hybrid',
)

# Depth alone, and only for the time of one step: each block is the same code.
FEWER_LAYERS = ('bytes_lm', 'copying')


# What stands for a config whose default is too long for a test.
SMALL = {'ring_1m': 'ring_1m:sibling', 'zoo': 'zoo:full'}


def load(spec, folder=None):
  name, colon, argument = SMALL.get(spec, spec).partition(':')
  path = ROOT / 'configs' / f'{name}.py'
  config = load_config_file(f'{path}{colon}{argument}')
  if name in FEWER_LAYERS:
    config.model.layers = config.model.layers[:1]
  if name == 'smollm2':
    shrink(config, folder)
  return from_config_dict(ExperimentConfig, config)


def shrink(config, folder):
  """A model of the same kind, of nothing that has to be fetched."""
  tiny_tokenizer('import os').save(folder / 'tokenizer')
  config.task.tokenizer = str(folder / 'tokenizer')
  config.task.path = str(ROOT / 'longctx')
  config.task.seq_len, config.model.vocab_size = 32, None
  config.model.d_model, config.model.mlp_dim = 36, 32
  config.model.head_dim = 4
  config.model.layers = config.model.layers[:3]


@pytest.mark.parametrize('spec', [*SPECS, *ARGUMENTS])
def test_config_is_checked_and_makes_a_finite_step(spec, tmp_path):
  for run in runs.prepare(load(spec, tmp_path), tmp_path / 'run'):
    config = dataclasses.replace(run.config, batch_size=2)
    place = dict(placement=run.placement)
    batches = runs.open_batches(config, run.task, 'train', **place)
    batch = steps.put(next(batches), **place)
    batches.close()
    graph, _ = steps.abstract_params(run.model)
    state = steps.init_state(run.model, config, **place)
    before = jax.device_get(state['params'])
    train = steps.make_steps(graph, config, **place).train
    state, values = train(state, batch, 1)
    assert np.isfinite(float(values['loss']))
    assert float(values['weight']) > 0
    after = jax.device_get(state['params'])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize('spec', SPECS)
def test_docstring_says_what_to_run_and_what_comes_out(spec):
  text = pathlib.Path(ROOT / 'configs' / f'{spec}.py').read_text()
  docstring = text.split('"""')[1]
  assert f'--config=configs/{spec}.py' in docstring
  if spec != 'default':
    assert 'Expected' in docstring


@pytest.mark.parametrize('size', ['laptop', 'hybrid'])
def test_a_million_tokens_are_checked_without_compiling(size, tmp_path):
  (run,) = runs.prepare(load(f'ring_1m:{size}'), tmp_path)
  assert run.task.seq_len == 2**20
  assert run.placement.layout.shard_len == 2**17


def test_pod_asks_for_its_devices(tmp_path):
  with pytest.raises(ValueError, match='needs 128 devices'):
    runs.prepare(load('ring_1m:pod'), tmp_path)
