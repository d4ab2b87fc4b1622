r"""Passkey: find a number said somewhere in a long filler, and say it again.

Landmark Attention's test (Mohtashami and Jaggi, 2023, arXiv:2305.16300), on
tokens instead of English, trained from scratch. The argument names the variant.

  python train.py --config=configs/passkey.py            # full
  python train.py --config=configs/passkey.py:sliding_window\(window=32\)
  python eval.py sweep --workdir=runs/passkey --task.depth=0.0,0.25,0.5,0.75,1.0
  python eval.py sweep --workdir=runs/passkey --task.seq_len=128,256,512,1024

Expected: no figure has been measured for this config yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = 'full') -> ConfigDict:
  config = default.get_config('passkey')
  config.task.seq_len = 256

  config.model.layers = (variant, variant)
  config.model.d_model = 64
  config.model.num_heads = 4
  config.model.short_conv = 4
  config.model.position_encoding = 'none'

  config.steps = 1500
  config.batch_size = 32
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100
  return config
