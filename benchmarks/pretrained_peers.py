"""Other programs with the model of `pretrained.py`, which starts this.

For the Python that has them, which need have nothing of this package. Takes
turns: answers each line of input by one of tokens per second.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


def parse_arguments(argv):
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('program', choices=RUNS)
  parser.add_argument('source')
  parser.add_argument('--contexts', required=True)
  parser.add_argument('--dtype', required=True)
  for name in ('prompt', 'steps', 'rounds'):
    parser.add_argument(f'--{name}', type=int, required=True)
  args = parser.parse_args(argv)
  args.contexts = [int(part) for part in args.contexts.split(',')]
  return args


def some_tokens(count):
  return [token % 251 for token in range(count)]


def run_transformers(args):
  import torch
  from transformers import AutoModelForCausalLM

  path = Path(args.source)
  model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=getattr(torch, args.dtype)
  ).eval()

  @torch.inference_mode()
  def start(length):
    tokens = torch.tensor([some_tokens(length)])
    return model(tokens, use_cache=True, logits_to_keep=1)

  def decoder(context):
    held = [start(context)]

    @torch.inference_mode()
    def call():
      out = held[0]
      for _ in range(args.steps):
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        out = model(token, past_key_values=cache, use_cache=True)
      held[0] = out

    return call

  prefill = lambda: start(args.prompt)
  return prefill, {c: decoder(c) for c in args.contexts}


def run_llama_cpp(args):
  from llama_cpp import Llama

  capacity = max(args.prompt, *args.contexts)
  capacity += args.steps * (args.rounds + 1)
  make = lambda: Llama(
    args.source, n_ctx=capacity, n_threads=os.cpu_count(), verbose=False
  )

  def decoder(context):
    model = make()
    model.eval(some_tokens(context))

    def call():
      for _ in range(args.steps):
        model.eval([model.sample(temp=0.0)])

    return call

  reader = make()

  def prefill():
    reader.reset()
    reader.eval(some_tokens(args.prompt))

  return prefill, {c: decoder(c) for c in args.contexts}


RUNS = {'transformers': run_transformers, 'llama_cpp': run_llama_cpp}


def main(argv=None):
  args = parse_arguments(argv)
  prefill, decoders = RUNS[args.program](args)

  def rate(tokens, call):
    start = time.perf_counter()
    call()
    return tokens / (time.perf_counter() - start)

  for call in (prefill, *decoders.values()):
    call()
  # Libraries may print too.
  print('ready', flush=True)
  for _ in sys.stdin:
    decode = {c: rate(args.steps, call) for c, call in decoders.items()}
    line = {'prefill': rate(args.prompt, prefill), 'decode': decode}
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
