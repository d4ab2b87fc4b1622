r"""Attention sinks in their smallest model: bigrams that triggers interrupt.

One layer with one head and an MLP learns bigrams and, after a trigger, to copy
the token before it (Guo et al., 2024, arXiv:2410.13835). The head has work at
triggers; elsewhere it rests on BOS, unless it may attend to nothing.

  python train.py --config=configs/sinks.py                  # softmax
  python train.py --config=configs/sinks.py:sigmoid          # without a sink
  python train.py --config=configs/sinks.py:full,softmax1,sigmoid
  python -m longctx.analysis --workdir=runs/sinks

Expected: studies/sinks/README.md, three seeds of eight variants. About a minute
each on one CPU core (AMD EPYC).
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = 'full') -> ConfigDict:
  config = default.get_config('bigram_backcopy')
  names = argument.split(',')
  config.model.layers = (names[0],)
  if len(names) > 1:
    runs = {name: {'model': {'layers': (name,)}} for name in names}
    config.runs = ConfigDict(runs)

  config.model.d_model = 64
  config.model.num_heads = 1
  config.model.mlp_dim = 256
  # RoPE turns the key of BOS away with distance: one layer leans on it less.
  config.model.position_encoding = 'learned'
  config.model.tied_head = False

  config.steps = 800
  config.batch_size = 64
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50
  config.eval.every = 200
  config.eval.test_batches = 64
  return config
