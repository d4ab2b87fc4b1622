"""The library's point: softmax recalls exactly what linear attention cannot.

Multi-query associative recall, 16 key-value pairs in 64 tokens. The same
two-layer model, one head with d_k = 16, reads with softmax attention and with
linear attention over elu + 1. Softmax keeps every key; linear attention keeps
one 16 x 16 matrix, in which 16 pairs get into each other's way. Zoology
(arXiv:2312.04927) and Transformers are RNNs (arXiv:2006.16236).

  python train.py --config=configs/quickstart.py

Expected on the test split, measured at commit d968c53 on two CPU cores (AMD
EPYC) in 82 seconds: softmax 1.000, elu+1 0.206, chance 0.008; one seed. The
comparison is one of equal budgets: at a constant learning rate of 8e-3, elu+1
had 0.74 of the training batches right after 2,500 steps, and with value_dim=64,
a state four times as large, 0.96 after 2,200. Softmax needs 300.
"""

from ml_collections import ConfigDict

from configs import default
from longctx import tasks


def get_config() -> ConfigDict:
  config = default.get_config()
  config.steps = 1500
  config.batch_size = 64
  config.task = ConfigDict(
    tasks.task_defaults('mqar', seq_len=64, vocab_size=256, num_pairs=16)
  )

  config.model.d_model = 64
  config.model.num_heads = 1
  config.model.head_dim = 16
  config.model.value_dim = 16
  config.model.short_conv = 4
  config.model.position_encoding = 'none'

  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50

  config.eval.every = 100
  config.eval.batches = 4
  config.runs = ConfigDict(
    {
      'softmax': {'model': {'layers': ('full', 'full')}},
      'elu+1': {'model': {'layers': ('linear', 'linear')}},
    }
  )
  return config
