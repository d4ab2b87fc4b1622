r"""A language model of bytes to stream with: it begins every window with BOS.

Text is that of configs/bytes_lm.py. studies/streaming measures what the model
loses without its first tokens, and why that is nothing at this size.

  python train.py --config=configs/streaming.py
  python eval.py stream --workdir=runs/streaming --tokens=2048 \
    --dense_tokens=2048 --recomputed=2048 --rows=8 --bucket=2048 \
    --policies=dense,recompute,window,sinks,sinks_text

Expected: 1.17 to 1.21 nats per byte on the test split after 1,500 steps, 67% of
bytes right, in five to six minutes on two CPU cores (seeds 0, 1 and 2).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
  config = default.get_config('bytes_lm')
  config.task.seq_len = 256
  config.task.prepend_bos = True

  config.model.layers = ('full',) * 4
  config.model.d_model = 128
  config.model.num_heads = 4
  config.model.mlp_dim = 512

  config.steps = 1500
  config.batch_size = 8
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100

  config.eval.every = 500
  config.eval.batches = 16
  config.eval.test_batches = 32
  return config
