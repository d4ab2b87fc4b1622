r"""Text generation by a trained model of bytes, printed as it is drawn.

    python -m longctx.generate --workdir=runs/bytes_lm --prompt='def main('
    python -m longctx.generate --workdir=runs/bytes_lm --run=full \
      --max_new=2000 --temperature=0.8 --top_p=0.95 --seed=1 < prompt.txt
"""

import functools
import sys
from collections.abc import Callable

import jax
from flax import nnx

from longctx import parallel
from longctx.decoding.sampler import Generator, Prompts, Sampling
from longctx.evaluation import sweep
from longctx.tasks.bytes_lm import BOS, BytesLM
from longctx.training import metrics


def prepare(args) -> Callable[[], None]:
  """Reads the model and the prompt."""
  run = sweep.choose(sweep.open_workdir(args.workdir), args.run)
  if not isinstance(run.task, BytesLM):
    raise ValueError(
      f'{run.workdir} was trained on {run.config.task["name"]}, and text is '
      'written by a model of bytes_lm'
    )
  text = sys.stdin.read() if args.prompt is None else args.prompt
  if not text:
    raise ValueError('the prompt is empty: give --prompt a text')
  if args.max_new < 1:
    raise ValueError(f'--max_new={args.max_new} must be at least 1')
  if args.devices < 1:
    raise ValueError(f'--devices={args.devices} must be at least 1')
  # A model that has never read BOS goes on worse from it.
  start = [BOS] * run.task.has_bos
  prompts = Prompts.of([[*start, *text.encode()]])
  if note := parallel.ensure_devices(args.devices):
    metrics.say(note)
  mesh = None
  if args.devices != 1:
    mesh = parallel.make_mesh(seq=args.devices)
  sampling = Sampling(
    temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
  )
  graph, params, step, _ = sweep.restore(run)
  generator = Generator(
    nnx.merge(graph, params),
    capacity=int(prompts.lengths[0]) + args.max_new,
    sampling=sampling,
    stop_tokens=(BOS,),
    step=step,
    mesh=mesh,
    num_tokens=run.task.vocab_size,
  )
  stream = generator.start(prompts)
  return functools.partial(_write, generator, stream, text, args)


def _write(generator, stream, text, args):
  out = sys.stdout.buffer
  out.write(text.encode())
  key = jax.random.key(args.seed)
  for _ in range(args.max_new):
    stream, tokens = generator.draw(stream, key, 1)
    token = int(tokens[0, 0])
    if token == BOS:
      break
    out.write(bytes([token]))
    out.flush()
  out.write(b'\n')
  out.flush()
