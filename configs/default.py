"""The defaults of every setting; other configs start here and assign.

python train.py --config=configs/default.py:copying --config.task.seq_len=32

The argument names the task, 'mqar' if it is left out.
"""

from longctx import tasks
from longctx.training.config import ExperimentConfig, to_config_dict


def get_config(task: str = 'mqar'):
  return to_config_dict(ExperimentConfig(task=tasks.task_defaults(task)))
