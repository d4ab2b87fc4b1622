r"""Reads an endless stream in constant memory, under what policies keep.

python eval.py stream --workdir=runs/bytes_lm --tokens=1000000 \
  --policies=dense,window,recompute,sinks,sinks_text --slots=256 --sinks=4

Full attention is exchanged for what each policy keeps; see
`longctx.evaluation.streaming`.
"""

import functools
from collections.abc import Callable

from longctx.evaluation import streaming, sweep


def prepare(args) -> Callable[[], object]:
  """Makes the caches of every policy, without computing."""
  given = vars(args)
  names = streaming.StreamConfig.__dataclass_fields__
  run = sweep.choose(sweep.open_workdir(args.workdir), args.run)
  config = streaming.StreamConfig(**{k: given[k] for k in names if k in given})
  streaming.check(run, config)
  return functools.partial(streaming.evaluate_stream, run, config)
