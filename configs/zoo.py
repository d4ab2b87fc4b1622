r"""Every variant on one task, side by side.

Multi-query associative recall, 8 key-value pairs in 64 tokens: the same
two-layer model with each variant, a short convolution before it, no MLP and no
positions, as in Zoology (arXiv:2312.04927). One table compares accuracy, steps
to 90%, parameters, what decoding keeps and speed.

  python train.py --config=configs/zoo.py                   # equal widths
  python train.py --config=configs/zoo.py:parameters        # equal parameters
  python train.py --config=configs/zoo.py:state_bytes       # equal states
  python train.py --config=configs/zoo.py:full,linear       # these alone

`parameters` widens every model but the largest by an MLP until all have as many
parameters. `state_bytes` gives the variants whose state does not grow with the
sequence the value width at which they keep as much as full attention does of 64
tokens; those that keep keys and values are left out.

Windows, blocks and strides are a quarter of the sequence or less, so that what
they leave out shows.

Expected: studies/zoo/README.md has three seeds of all variants. Attention to
every key 0.999 by step 200, Based 0.98, DeltaNet 0.93, a window of 16 about
0.45, elu+1 0.12; variants that begin by forgetting fast have not learned yet.
About 20 minutes a seed on two CPU cores (AMD EPYC).
"""

import dataclasses

from ml_collections import ConfigDict

from configs import default
from longctx import tasks
from longctx.attention import VARIANTS
from longctx.models.matching import cost_of, match
from longctx.models.transformer import TransformerConfig
from longctx.training.config import from_config_dict

TASK = tasks.task_defaults('mqar', seq_len=64, vocab_size=256, num_pairs=8)

# For variants whose defaults are made for longer sequences.
ARGUMENTS = {
  'bigbird': 'window=8, num_global=4, block=4, num_random=1',
  'block_sparse': "block=16, pattern=('1', '11', '011', '0011')",
  'dilated': 'window=8, dilation=2',
  'longformer': 'window=12, num_global=4',
  'moba': 'block_size=8, top_k=2',
  'nsa': 'compress_block=4, stride=2, block_size=4, top_n=3, window=8',
  'sliding_window': 'window=16',
  'streaming': 'num_sinks=4, window=12',
  'window_linear': 'window=8',
}


def get_config(argument: str = '') -> ConfigDict:
  config = default.get_config()
  config.task = ConfigDict(TASK)
  config.steps = 400
  config.batch_size = 64
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50
  config.eval.every = 50
  config.eval.batches = 4
  config.checkpoint.every = 200

  config.model.d_model = 64
  config.model.num_heads = 2
  config.model.short_conv = 4
  config.model.position_encoding = 'none'
  config.model.mlp_dim = 0

  matched = argument if argument in ('parameters', 'state_bytes') else ''
  names = argument.split(',') if argument and not matched else sorted(VARIANTS)
  models = {name: _model(config, name) for name in names}
  changes = {name: {} for name in models}
  if matched:
    changes = MATCHED[matched](models)
  config.runs = ConfigDict(
    {
      name: {'model': {'layers': models[name].layers, **change}}
      for name, change in changes.items()
    }
  )
  return config


def _model(config: ConfigDict, name: str) -> TransformerConfig:
  layer = f'{name}({ARGUMENTS.get(name, "")})'
  model = from_config_dict(TransformerConfig, config.model)
  vocab_size = tasks.make_task(**TASK).vocab_size
  return dataclasses.replace(model, layers=(layer,) * 2, vocab_size=vocab_size)


def _equal_parameters(models: dict[str, TransformerConfig]) -> dict[str, dict]:
  largest = max(models.values(), key=_parameters)
  changes = {}
  for name, model in models.items():
    if _parameters(model) < 0.95 * _parameters(largest):
      model = match(
        model,
        like=largest,
        cost='parameters',
        vary='mlp_dim',
        seq_len=TASK['seq_len'],
      )
    changes[name] = {'mlp_dim': model.mlp_dim}
  return changes


def _parameters(model: TransformerConfig) -> int:
  return cost_of(model, 'parameters', seq_len=TASK['seq_len'])


def _equal_states(models: dict[str, TransformerConfig]) -> dict[str, dict]:
  T = TASK['seq_len']
  full = next(iter(models.values()))
  full = dataclasses.replace(full, layers=('full', 'full'))
  changes = {'full': {}}
  for name, model in models.items():
    once, twice = (cost_of(model, 'state_bytes', seq_len=n) for n in (T, 2 * T))
    if once == twice:
      matched = match(
        model,
        like=full,
        cost='state_bytes',
        vary='value_dim',
        seq_len=T,
        tolerance=0.25,
      )
      changes[name] = {'value_dim': matched.value_dim}
  return changes


MATCHED = {'parameters': _equal_parameters, 'state_bytes': _equal_states}
