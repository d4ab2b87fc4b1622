"""Trained models as safetensors and config.json that transformers loads.

python -m longctx.pretrained export --workdir=runs/llama --out=exported
"""

from collections.abc import Callable

from flax import nnx

from longctx.evaluation import sweep
from longctx.pretrained.exporting import export
from longctx.tasks.text_lm import TextLM


def prepare(args) -> Callable[[], None]:
  """Reads the parameters and writes the folder, where a family has them."""
  run = sweep.choose(sweep.open_workdir(args.workdir), args.run)
  learned = sweep.restore(run)
  model = nnx.merge(learned.graph, learned.params)
  tokenizer = run.task.codec if isinstance(run.task, TextLM) else None
  folder = export(
    model, args.out, family=args.family or None, tokenizer=tokenizer
  )
  return lambda: print(
    f'wrote step {learned.step} of {run.workdir} to {folder}'
  )
