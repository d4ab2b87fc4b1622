r"""Copying strings of up to 50 letters, for studies/copying.

'Repeat After Me' (Jelassi et al., 2024, arXiv:2402.01032) at a size for CPUs:
two layers, width 64, four heads, a short convolution, 26 letters, trained on
lengths from 1 to 50. The argument names one run; without it there are all.

  python train.py --config=studies/copying/config.py
  python train.py --config=studies/copying/config.py:no_positions
"""

from ml_collections import ConfigDict

from configs import default

# Of one layer and one small head, so that the bound on errors is above 0 at
# the lengths that are tested.
TINY = {'num_heads': 1, 'head_dim': 4, 'value_dim': 8}

RUNS = {
  'no_positions': {'layers': ('full', 'full')},
  'scaled': {'layers': ('scalable_softmax', 'scalable_softmax')},
  'alibi': {'layers': ('full', 'full'), 'position_encoding': 'alibi'},
  'rope': {'layers': ('full', 'full'), 'position_encoding': 'rope'},
  'window': {'layers': ('sliding_window(window=64)',) * 2},
  'linear': {'layers': ('linear', 'linear')},
  'deltanet': {'layers': ('deltanet', 'deltanet')},
  'deltanet_tiny': {'layers': ('deltanet',), **TINY},
}

ATTENTION = ('no_positions', 'scaled', 'alibi', 'rope')
FIXED_STATE = tuple(name for name in RUNS if name not in ATTENTION)


def steps(name: str) -> int:
  """What has learned to copy by step 300 is not trained as long."""
  return 400 if name in ATTENTION else 600


def get_config(name: str = '') -> ConfigDict:
  config = default.get_config('copying')
  config.task.seq_len = 101
  config.task.num_symbols = 26
  config.task.min_length = 1
  config.task.max_length = 50

  config.model.d_model = 64
  config.model.num_heads = 4
  config.model.short_conv = 4
  config.model.position_encoding = 'none'
  # A tied head starts by predicting the token just read, and unlearns it first.
  config.model.tied_head = False

  config.batch_size = 16
  config.optimizer.learning_rate = 5e-3
  config.optimizer.warmup_steps = 50
  config.eval.every = 100
  config.eval.batches = 4
  config.eval.test_batches = 8
  config.checkpoint.every = 0
  names = [name] if name else list(RUNS)
  config.runs = ConfigDict(
    {n: {'model': RUNS[n], 'steps': steps(n)} for n in names}
  )
  return config
