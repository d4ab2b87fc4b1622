r"""Trains what a config file describes, or continues where it was stopped.

python train.py --config=configs/mqar.py
python train.py --config=configs/mqar.py:linear --workdir=/data/mqar \
  --config.steps=500 --config.optimizer.learning_rate=3e-3

Several processes, one per host, each with the same command but for its number:

python train.py --config=configs/ring_1m.py:pod --coordinator=auto
python train.py --config=configs/ring_1m.py:sibling \
  --coordinator=localhost:1234 --num_processes=2 --process_id=0
"""

import pathlib
import sys

from absl import flags

from longctx.cli import flags as cli
from longctx.training import runs
from longctx.training import trainer as train
from longctx.training.config import ExperimentConfig, from_config_dict

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'folder of the run; runs/<config> by default'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', "host:port of the first process; 'auto' on clusters"
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'processes that train together', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'which of them this is', lower_bound=0
)


def main(argv: list[str]):
  with cli.before_compiling():
    spec, overridden = cli.parse_config_flags(argv)
    config = from_config_dict(ExperimentConfig, overridden)
    workdir = pathlib.Path(_WORKDIR.value or cli.default_workdir(spec))
    runs.start_devices(
      config,
      coordinator=_COORDINATOR.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
    )
    prepared = runs.prepare(config, workdir)
  with cli.while_running():
    train.train(prepared, workdir)


if __name__ == '__main__':
  main(sys.argv)
