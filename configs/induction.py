"""Induction heads: a random permutation, repeated; what came after it last?

Two attention-only layers learn to look up the token after the previous
occurrence of the current one (Olsson et al., 2022, arXiv:2209.11895), and do so
suddenly; one layer without a short convolution cannot.

  python train.py --config=configs/induction.py
  python train.py --config=configs/induction.py:1        # one layer
  python eval.py --workdir=runs/induction --sweep=seq_len=64,128,256

Expected, measured: not yet. A prototype reached 0.999 with two layers, with the
jump between steps 200 and 300, and 0.09 with one.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(num_layers: str = '2') -> ConfigDict:
  config = default.get_config('induction')
  config.task.seq_len = 64
  config.task.vocab_size = 64

  config.model.layers = ('full',) * int(num_layers)
  config.model.d_model = 64
  config.model.num_heads = 4
  config.model.positions = 'rope'

  config.steps = 600
  config.batch_size = 64
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50
  config.eval.every = 50
  return config
