r"""Trains what a config file describes, or continues where it was stopped.

python train.py --config=configs/mqar.py
python train.py --config=configs/mqar.py:linear --workdir=/data/mqar \
  --config.steps=500 --config.optimizer.learning_rate=3e-3
"""

import pathlib
import sys

from absl import flags

from longctx import cli, runs, train
from longctx.config import ExperimentConfig, from_config_dict

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'folder of the run; runs/<config> by default'
)


def main(argv: list[str]):
  with cli.before_compiling():
    spec, overridden = cli.parse_config_flags(argv)
    config = from_config_dict(ExperimentConfig, overridden)
    workdir = pathlib.Path(_WORKDIR.value or cli.default_workdir(spec))
    prepared = runs.prepare(config, workdir)
  with cli.while_running():
    train.train(prepared, workdir)


if __name__ == '__main__':
  main(sys.argv)
