r"""A language model of bytes to stream with: it begins every window with BOS.

Text is that of configs/bytes_lm.py. The anchor at the beginning becomes an
attention sink; studies/streaming measures what the model loses without it.

  python train.py --config=configs/streaming.py
  python eval.py --workdir=runs/streaming --mode=stream --tokens=16384 \
    --policies=dense,recompute,window,sinks,sinks_text --rows=8

Expected: 1.14 nats per byte after 1,200 steps (training loss, one seed); the
whole run has not been measured. What streams show is in studies/streaming.
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
