r"""A model of bytes whose windows grow, shrink or stay, for
studies/window_schedule.

Longformer (arXiv:2004.05150), section 4.2: four layers whose windows have the
same mean. The argument is one of SCHEDULES.

  python train.py --config=studies/window_schedule/config.py:increasing
"""

from ml_collections import ConfigDict

from configs import default


def layers(windows, dilated: int = 0) -> tuple[str, ...]:
  """Layers of these windows, of which the last ones dilate half the heads."""
  found = []
  for index, window in enumerate(windows):
    dilation = (1, 2) if index >= len(windows) - dilated else 1
    found.append(f'longformer(window={window}, dilation={dilation})')
  return tuple(found)


# Keys that a query reads, its own included; 30 on average.
GROWING = (8, 16, 32, 64)
SCHEDULES = {
  'decreasing': layers(GROWING[::-1]),
  'fixed': layers((30,) * 4),
  'increasing': layers(GROWING),
  'dilated': layers(GROWING, dilated=2),
}


def get_config(schedule: str = 'increasing') -> ConfigDict:
  config = default.get_config('bytes_lm')
  config.task.seq_len = 256

  config.model.layers = SCHEDULES[schedule]
  config.model.d_model = 64
  config.model.num_heads = 4
  config.model.mlp_dim = 256

  config.steps = 500
  config.batch_size = 8
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 50
  config.eval.every = 250
  config.eval.batches = 8
  config.eval.test_batches = 64
  config.checkpoint.every = 250
  return config
