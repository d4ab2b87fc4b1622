r"""Workdirs of pretrained weights, for eval, stream, analysis and train.

python -m longctx.pretrained import smollm2 --workdir=runs/smollm2
python -m longctx.pretrained import smollm2 --workdir=runs/smollm2-32k \
  --model.rope_scaling="yarn(factor=4.0, original_context=8192)"
python -m longctx.pretrained import ~/models/Llama-3.2-1B --workdir=runs/llama
"""

import functools
from collections.abc import Callable

from longctx.cli.prepare import literal
from longctx.training import imports, trainer


def prepare(args) -> Callable[[], None]:
  """Reads the config, and refuses what has no equal here."""
  fields = {'dtype': args.dtype, 'param_dtype': args.dtype}
  for argument in args.overrides:
    key, equals, value = argument.removeprefix('--model.').partition('=')
    if not argument.startswith('--model.') or not equals:
      raise ValueError(
        f'unknown argument {argument!r}; fields are --model.KEY=VALUE'
      )
    fields[key] = literal(value)
  run = imports.prepare(
    args.source, args.workdir, seq_len=args.seq_len, fields=fields
  )
  return functools.partial(trainer.save_start, run)
