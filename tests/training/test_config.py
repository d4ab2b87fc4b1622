"""Configs: dataclasses in, ConfigDict out, and back without loss."""

import json

import pytest

from longctx.models.transformer import TransformerConfig
from longctx.training import config as config_lib
from longctx.training.config import (
  ExperimentConfig,
  from_config_dict,
  to_config_dict,
)
from tests.tiny import tiny_config


def test_round_trip_through_config_dict_and_json_keeps_every_field():
  config = tiny_config(
    model={'layers': ('full', "linear(feature_map='taylor')"), 'head_dim': 4}
  )
  assert from_config_dict(ExperimentConfig, to_config_dict(config)) == config
  text = json.dumps(config_lib.to_dict(config))
  assert from_config_dict(ExperimentConfig, json.loads(text)) == config


def test_config_written_before_a_group_was_added_loads_with_its_defaults():
  stored = config_lib.to_dict(tiny_config())
  del stored['analysis']
  assert from_config_dict(ExperimentConfig, stored) == tiny_config()


def test_field_that_may_be_none_can_be_assigned_and_stays_typed():
  config = to_config_dict(TransformerConfig())
  assert config.head_dim is None
  config.head_dim = 16
  assert from_config_dict(TransformerConfig, config).head_dim == 16
  with pytest.raises(TypeError):
    config.head_dim = 'wide'


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'stepz': 3}, r'unknown config key stepz; did you mean steps\?'),
    ({'model': {'dmodel': 3}}, 'model.dmodel; did you mean model.d_model'),
    ({'zzz': 3}, 'zzz; known: analysis, batch_size, checkpoint'),
    ({'steps': 'many'}, "steps='many' must be an integer, at least 1"),
    ({'steps': True}, 'steps=True must be an integer, at least 1, such as 1'),
    ({'steps': 0}, 'steps=0 must be at least 1'),
    ({'model': 3}, 'model must be a group of keys, got 3'),
    (
      {'model': {'head_dim': 'wide'}},
      'model.head_dim=.* must be an integer, .* or None',
    ),
    ({'batch_size': 9, 'optimizer': {'accumulation': 2}}, 'a multiple of'),
    ({'task': {'num_pair': 3}}, 'did you mean num_pairs'),
    ({'task': {'name': 'mqarr'}}, "unknown task 'mqarr'"),
    ({'optimizer': {'name': 'adam'}}, 'known: adamw, muon'),
    (
      {'optimizer': {'learning_rate': float('nan')}},
      'must be a finite number, above 0',
    ),
    ({'optimizer': {'schedule': 'step'}}, 'step_at=0 must be later'),
    ({'analysis': {'every': -1}}, 'analysis.every=-1 must be at least 0'),
    ({'analysis': {'rows': 0}}, 'analysis.rows=0 must be at least 1'),
    ({'analysis': {'dense_every': -1}}, 'analysis.dense_every=-1 must be'),
    ({'analysis': {'bend': 0}}, r'analysis.bend=0 must be in \(0, 1\)'),
    ({'analysis': {'bnd': 0.1}}, 'did you mean analysis.bend'),
  ],
)
def test_wrong_config_is_refused_in_one_line(overrides, message):
  with pytest.raises(ValueError, match=message) as error:
    tiny_config(**overrides)
  assert '\n' not in str(error.value)


def test_integer_stands_for_a_float():
  config = tiny_config(optimizer={'learning_rate': 1})
  assert type(config.optimizer.learning_rate) is float


def test_layer_names_are_split_outside_brackets():
  text = 'full, sliding_window(window=4),linear(chunk_size=8,scale=1)'
  config = tiny_config(model={'layers': (text,)})
  assert config.model.layers == (
    'full',
    'sliding_window(window=4)',
    'linear(chunk_size=8,scale=1)',
  )


def test_runs_inherit_and_a_run_with_another_task_takes_its_defaults():
  base = config_lib.to_dict(tiny_config())
  base['runs'] = {
    'a': {'model': {'layers': ['linear']}},
    'b': {'task': {'name': 'copying', 'seq_len': 20}},
  }
  runs = config_lib.expand_runs(from_config_dict(ExperimentConfig, base))
  assert runs['a'].model.layers == ('linear',)
  assert runs['a'].task['num_pairs'] == 2
  assert runs['b'].task['name'] == 'copying'
  assert runs['b'].task['num_symbols'] == 10
  assert all(run.steps == 12 and not run.runs for run in runs.values())


@pytest.mark.parametrize('name', ['', '../x', '.hidden'])
def test_run_name_must_be_a_folder_name(name):
  config = ExperimentConfig(runs={name: {}})
  with pytest.raises(ValueError, match='cannot name a folder'):
    config_lib.expand_runs(config)
