r"""Multi-query associative recall: one variant at one load.

Two layers of one head, no MLP and no positions, each attention behind a short
convolution, as in Zoology (Arora et al., 2023, arXiv:2312.04927) and Based
(arXiv:2402.18668). The argument names the variant.

  python train.py --config=configs/mqar.py               # full
  python train.py --config=configs/mqar.py:linear
  python train.py --config=configs/mqar.py:sliding_window\(window=16\)
  python eval.py sweep --workdir=runs/mqar --task.num_pairs=4,8,16,32

Expected: no figure has been measured for this config yet. Published (figures,
no table): attention solves every length at every width; models with a fixed
state need one that grows with the number of pairs.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = 'full') -> ConfigDict:
  config = default.get_config('mqar')
  config.task.seq_len = 128
  config.task.vocab_size = 512
  config.task.num_pairs = 16

  config.model.layers = (variant, variant)
  config.model.d_model = 64
  config.model.num_heads = 1
  config.model.short_conv = 4
  config.model.position_encoding = 'none'

  config.steps = 2000
  config.batch_size = 64
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100
  return config
