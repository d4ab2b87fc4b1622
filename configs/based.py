r"""Based: short convolutions, a short window and a small exact-enough memory.

Two layers of one head, the first a window of 64 tokens, the second Taylor
linear attention of queries and keys of 16 numbers, each behind a convolution
over three tokens; no MLP and no positions: the layers of 'Simple linear
attention language models balance the recall-throughput tradeoff' (Arora et al.,
2024, arXiv:2402.18668) on the recall of their figure 2. The argument is the
feature dimension, 8, 16 or 24 there; the state grows with its square.

  python train.py --config=configs/based.py
  python train.py --config=configs/based.py:8 --workdir=runs/based-8
  python eval.py sweep --workdir=runs/based --task.num_pairs=8,16,32,64

Expected: no figure has been measured for this config yet. Published (a figure,
no table): accuracy grows with the bytes of the state, across classes of models.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(feature_dim: str = '16') -> ConfigDict:
  config = default.get_config('mqar')
  config.task.seq_len = 256
  config.task.vocab_size = 512
  config.task.num_pairs = 32

  config.model.layers = (
    'sliding_window(window=64)',
    f'based(feature_dim={int(feature_dim)})',
  )
  config.model.d_model = 64
  config.model.num_heads = 1
  config.model.short_conv = 3
  config.model.position_encoding = 'none'

  config.steps = 1000
  config.batch_size = 32
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100
  return config
