r"""Text generation by a trained model of text, printed as it is drawn.

    python -m longctx.generate --workdir=runs/bytes_lm --prompt='def main('
    python -m longctx.generate --workdir=runs/smollm2 --chat --prompt='Hello!'
    python -m longctx.generate --workdir=runs/bytes_lm --run=full \
      --max_new=2000 --temperature=0.8 --top_p=0.95 --seed=1 < prompt.txt
"""

import functools
import sys
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from longctx import parallel
from longctx.decoding.sampler import Generator, Prompts, Sampling
from longctx.evaluation import sweep
from longctx.tasks.text_lm import TextLM
from longctx.tasks.text_task import TextTask
from longctx.training import metrics


def prepare(args) -> Callable[[], None]:
  """Reads the model and the prompt."""
  run = sweep.choose(sweep.open_workdir(args.workdir), args.run)
  task = run.task
  if not isinstance(task, TextTask):
    raise ValueError(
      f'{run.workdir} was trained on {run.config.task["name"]}, and text is '
      'written by a model of bytes_lm or text_lm'
    )
  try:
    text = sys.stdin.read() if args.prompt is None else args.prompt
    text.encode()
  except UnicodeError as error:
    raise ValueError(f'the prompt is no text in UTF-8: {error}') from error
  if not text:
    raise ValueError('the prompt is empty: give --prompt a text')
  if args.max_new < 1:
    raise ValueError(f'--max_new={args.max_new} must be at least 1')
  if args.devices < 1:
    raise ValueError(f'--devices={args.devices} must be at least 1')
  if args.chat and not isinstance(task, TextLM):
    raise ValueError('--chat is of a text_lm whose tokenizer has a template')
  prompt, before = text, text
  if args.chat:
    prompt = task.codec.chat([{'role': 'user', 'content': text}])
    before = ''
  read = task.encode(prompt)
  prompts = Prompts.of([read])
  if note := parallel.ensure_devices(args.devices):
    metrics.say(note)
  mesh = None
  if args.devices != 1:
    mesh = parallel.make_mesh(seq=args.devices)
  sampling = Sampling(
    temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
  )
  graph, params, step, _ = sweep.restore(run, compare_text=False)
  generator = Generator(
    nnx.merge(graph, params),
    capacity=int(prompts.lengths[0]) + args.max_new,
    sampling=sampling,
    stop_tokens=task.stop_tokens,
    step=step,
    mesh=mesh,
    num_tokens=task.vocab_size,
  )
  stream = generator.start(prompts)
  drawn = functools.partial(_draw, generator, stream, task, args)
  return lambda: _write(before, task.decode(drawn(), read))


def _draw(generator, stream, task, args) -> Iterator[int]:
  """Yields tokens as they are drawn, up to one that ends the text."""
  key = jax.random.key(args.seed)
  for _ in range(args.max_new):
    stream, tokens = generator.draw(stream, key, 1)
    token = int(tokens[0, 0])
    if token in task.stop_tokens:
      return
    yield token


def _write(before: str, parts: Iterator[bytes]):
  out = sys.stdout.buffer
  out.write(before.encode())
  for part in parts:
    out.write(part)
    out.flush()
  out.write(b'\n')
  out.flush()
