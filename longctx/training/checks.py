"""Checks of an experiment against its task and this machine, without compiling.

What fails after a minute of compiling, or at the last step, is refused here.
"""

import os

import jax
import jax.numpy as jnp

from longctx import masks, tasks
from longctx.models import TracedModel
from longctx.training import metrics
from longctx.training.config import ExperimentConfig

# Rows that tell what a task asks for, and the most positions of a mask.
EXAMPLES, POSITIONS = 4, 4096


def check_memory(
  config: ExperimentConfig, seq_len: int, parameter_bytes: int = 0
) -> None:
  """Refuses a run that memory cannot hold, by what it holds at least.

  Parameters and their gradients, the inputs of each block, and the batches of
  validation; what a step takes besides is known once it is compiled.
  """
  rows = config.batch_size // config.optimizer.accumulation
  layers, d_model = len(config.model.layers), config.model.d_model
  itemsize = jnp.dtype(config.model.dtype).itemsize
  inputs = max(rows, config.eval_rows) * seq_len * layers * d_model * itemsize
  # Tokens, labels and weights.
  kept = 12 * config.eval.batches * config.eval_rows * seq_len
  needed, there = 2 * parameter_bytes + inputs + kept, _memory()
  if there and needed > there:
    raise ValueError(
      f'the run holds {needed / 1e9:,.0f} GB at least ({inputs / 1e9:,.1f} of '
      f'inputs of blocks, {kept / 1e9:,.1f} of batches of validation, the rest '
      f'of parameters and gradients), and there are {there / 1e9:,.0f}: take a '
      'smaller model, or fewer or shorter rows'
    )


def _memory() -> int:
  """Bytes of all devices; 0 where that is not known."""
  here = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if jax.default_backend() != 'cpu':
    each = [device.memory_stats() or {} for device in jax.local_devices()]
    here = sum(stats.get('bytes_limit', 0) for stats in each)
  return jax.process_count() * here


def warn_of_later_tokens(
  config: ExperimentConfig, task: tasks.Task, traced: TracedModel
) -> None:
  """Says which layers see the tokens that they are to predict."""
  for layer, mask in zip(config.model.layers, traced.masks, strict=True):
    if reads_later(mask, task.seq_len) and asks_for_next(task, config.seed):
      metrics.say(
        f'warning: layer {layer!r} reads later tokens, and '
        f'{config.task["name"]} asks for the next ones, which it then sees: '
        'scores will be of copying, and it cannot generate; take a causal layer'
      )


def reads_later(mask: masks.Mask | None, seq_len: int) -> bool:
  """Whether a query reads a key behind its own position."""
  if mask is None or mask.is_causal:
    return False
  T = min(seq_len, POSITIONS)
  past = mask & masks.Causal()
  return mask.num_allowed(T, T) > past.num_allowed(T, T)


def asks_for_next(task: tasks.Task, seed: int) -> bool:
  """Whether most labels are the tokens that follow in the input."""
  asked = same = 0
  for index in range(EXAMPLES):
    example = task.get(seed, 'train', index)
    scored = example.weights[:-1] > 0
    asked += scored.sum()
    same += (example.labels[:-1] == example.tokens[1:])[scored].sum()
  return bool(2 * same > asked)
