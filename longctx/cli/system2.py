r"""Asks questions where opinions contradict the facts.

python eval.py s2a --workdir=runs/s2a --distractors=0,8,64,256
python eval.py s2a --workdir=runs/s2a --questions=256 \
  --conditions=none,suggest_wrong --methods=baseline,oracle,s2a

A run with a gate answers by itself, one that learned to rewrite by every
method; see `longctx.evaluation.system2`.
"""

import functools
from collections.abc import Callable

from longctx.evaluation import sweep, system2


def prepare(args) -> Callable[[], object]:
  """Opens the runs and checks that they can be asked."""
  given = vars(args)
  names = system2.S2AConfig.__dataclass_fields__
  runs = sweep.open_workdir(args.workdir)
  if args.run:
    runs = [sweep.choose(runs, name) for name in args.run]
  config = system2.S2AConfig(**{k: given[k] for k in names if k in given})
  system2.check(runs, config)
  return functools.partial(system2.measure, runs, args.workdir, config)
