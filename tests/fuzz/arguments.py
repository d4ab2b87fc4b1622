r"""Wrong arguments, drawn over every field of every config and every layer.

    python -m tests.fuzz.arguments --count=2000
    python -m tests.fuzz.arguments --count=1 --first=1234   # one case again
    python -m tests.fuzz.arguments --count=0 --processes=30   # of train.py

Each is accepted rightly or refused in one line when the config is read. A value
is accepted rightly if it is of the type and in the range that the annotation
says, by the oracle here, and if all that it makes can be traced: a training
step, what decoding keeps, an example of each split. `--runs` of the accepted
layers are computed too, and have to be finite.
"""

import argparse
import collections
import dataclasses
import inspect
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
import types
import typing
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import masks, tasks
from longctx.attention import VARIANTS, AttentionConfig, make_attention
from longctx.evaluation.streaming import StreamConfig
from longctx.evaluation.system2 import S2AConfig
from longctx.ops.dot_product_attention import BlockSizes
from longctx.ops.recurrence.feature_maps import FEATURE_MAPS
from longctx.training import config as config_lib
from longctx.training import runs, steps
from longctx.training.config import ExperimentConfig, from_config_dict
from longctx.typing import Between, field_types

ROOT = pathlib.Path(__file__).parents[2]
# As the command lines take them.
REFUSALS = (ValueError, NotImplementedError, OSError)
T = 16

# Of types and sizes that a field may not have, most of them.
POOL = (
  *('a', '', 'nan', '3', 'full', 'none', 'a\nb', 'x' * 5000, b'x'),
  *(None, True, False, [], [1], (), (1, 2), ('a',), {}, {'a': 1}, object()),
  *(0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 10**29, -(10**29), 10**400),
  *(0.0, -1.0, 2.0, 2.5, 8.5, 0.5, 0.99999999, 1.0, 1e-50, 1e39, 1e300, 1j),
  *(math.nan, math.inf, -math.inf, np.nan, np.int64(3), np.float32(2.5)),
  *(np.float64('nan'), np.bool_(True), np.array([1, 2]), np.array(3), len, int),
)

BASE = {
  'steps': 12,
  'batch_size': 8,
  'task': {'name': 'mqar', 'seq_len': T, 'vocab_size': 16, 'num_pairs': 2},
  'model': {'layers': ('full', 'full'), 'd_model': 16, 'num_heads': 2},
}
ASKED = {
  'task': {'name': 'passkey', 'seq_len': 24, 'num_symbols': 8, 'key_length': 3},
  'model': {'gate': {'keep': 2, 'answer': 3, 'labels': 0.0, 'noise': 1.0}},
}
# More than this is accepted, and not drawn.
DRAWN = 2**18


@dataclasses.dataclass(frozen=True)
class Target:
  """Field that a value is drawn for: where it is, and what it may be."""

  kind: str
  owner: str
  field: str
  hint: Any


def targets() -> list[Target]:
  found = []

  def walk(cls, path):
    for name, hint in _fields(cls).items():
      if dataclasses.is_dataclass(hint):
        walk(hint, f'{path}{name}.')
      elif name != 'task':
        found.append(Target('experiment', path, name, hint))

  walk(ExperimentConfig, '')
  for owner, cls in tasks.TASKS.items():
    found += [Target('task', owner, k, v) for k, v in _fields(cls).items()]
  shared = _fields(AttentionConfig)
  for owner, cls in VARIANTS.items():
    hints = field_types(cls.__init__)
    own = set(inspect.signature(cls.__init__).parameters) - {
      *('self', 'config', 'rngs')
    }
    own = {name: hints[name] for name in sorted(own)}
    found += [
      Target('layer', owner, k, v) for k, v in {**shared, **own}.items()
    ]
  for owner, cls in FEATURE_MAPS.items():
    fields = _fields(cls)
    found += [Target('features', owner, k, v) for k, v in fields.items()]
  for owner in (StreamConfig, S2AConfig, BlockSizes, *MASKS):
    fields = _fields(owner)
    found += [Target('class', owner.__name__, k, v) for k, v in fields.items()]
  return found


MASKS = {
  masks.SlidingWindow: dict(left=2),
  masks.Dilated: dict(window=2, dilation=2),
  masks.PrefixColumns: dict(n=2),
  masks.GlobalTokens: dict(n=2),
  masks.Beyond: dict(rows=1, columns=1),
  masks.RandomBlocks: dict(block=2, per_row=1, seed=0),
}
NAMED = {cls.__name__: cls for cls in (StreamConfig, S2AConfig, BlockSizes)}
NAMED |= {cls.__name__: cls for cls in MASKS}


def _fields(cls) -> dict[str, Any]:
  hints = field_types(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def draw(rng: np.random.Generator, hint: Any) -> Any:
  """A value: any of the pool, or one at an end of what is allowed."""
  ends = [
    end + step
    for bounds in _bounds(hint)
    for end in (bounds.low, bounds.high)
    if end is not None
    for step in (-1, 0, 1, 0.5)
  ]
  known = [x for x in _names(hint) for x in (x, x[:-1], x.upper())]
  if rng.random() < 0.4 and (ends or known):
    return (ends + known)[rng.integers(len(ends + known))]
  return POOL[rng.integers(len(POOL))]


def _bounds(hint: Any) -> list[Between]:
  if isinstance(hint, Between):
    return [hint]
  inside = typing.get_args(hint)
  if typing.get_origin(hint) is Annotated:
    inside = (*inside, *hint.__metadata__)
  return [x for part in inside for x in _bounds(part)]


def _names(hint: Any) -> list[str]:
  if typing.get_origin(hint) is Literal:
    return list(typing.get_args(hint))
  return [x for part in typing.get_args(hint) for x in _names(part)]


def is_right(value: Any, hint: Any) -> bool:
  """Whether a value is of a type and in its range: the oracle."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    if not is_right(value, args[0]):
      return False
    most = 2**31 - 1 if args[0] is int else math.inf
    bounds = [x for x in hint.__metadata__ if type(x) is Between]
    return all(_inside(float(value), x, most) for x in bounds)
  if origin is Literal:
    return isinstance(value, str) and value in args
  if origin is tuple:
    several = isinstance(value, (tuple, list))
    return several and all(is_right(x, args[0]) for x in value)
  if origin in (typing.Union, types.UnionType):
    return any(is_right(value, x) for x in args)
  if hint is int:
    ok = isinstance(value, (int, np.integer))
    return ok and not isinstance(value, bool) and abs(value) < 2**32
  if hint is float:
    ok = isinstance(value, (int, float, np.floating, np.integer))
    if not ok or isinstance(value, bool) or abs(value) > 3.4028234e38:
      return False
    return math.isfinite(value) and (value == 0 or abs(value) > 1.17e-38)
  if hint is bool:
    return isinstance(value, (bool, np.bool_))
  if hint is Any:
    return True
  return isinstance(value, origin or hint)


def _inside(x: float, bounds: Between, most: float) -> bool:
  high = most if bounds.high is None else bounds.high
  if bounds.open in ('low', 'both') and not x > bounds.low:
    return False
  if bounds.open in ('high', 'both') and not float(np.float32(x)) < high:
    return False
  return bounds.low <= x <= high


def make(target: Target, value: Any, folder: pathlib.Path):
  """Reads the value where a config or a layer would, and traces the rest."""
  given = {target.field: value}
  if target.kind == 'experiment':
    _experiment(target, value, folder)
  elif target.kind == 'task':
    _task(tasks.make_task(target.owner, **given))
  elif target.kind == 'layer':
    return _layer(target.owner, given)
  elif target.kind == 'features':
    arguments = {'feature_map': target.owner, 'feature_arguments': given}
    return _layer('linear', arguments)
  else:
    cls = NAMED[target.owner]
    made = cls(**{**MASKS.get(cls, {}), **given})
    if isinstance(made, masks.Mask):
      assert made.num_allowed(T, T) == made.dense(T, T).sum()


def _experiment(target: Target, value: Any, folder: pathlib.Path):
  values = config_lib._merge(BASE, {})
  if 'gate' in target.owner:
    values = config_lib._merge(values, ASKED)
  change = {target.field: value}
  for group in reversed(target.owner.split('.')[:-1]):
    change = {group: change}
  config = from_config_dict(ExperimentConfig, config_lib._merge(values, change))
  for run in runs.prepare(config, folder):
    config = run.config
    state = steps.abstract_state(run.model, config)
    graph, _ = steps.abstract_params(run.model)
    functions = steps.make_steps(graph, config)
    rows = {'train': config.batch_size, 'evaluate': config.eval_rows}
    kinds = {'tokens': 'int32', 'labels': 'int32', 'weights': 'float32'}
    for name, B in rows.items():
      batch = {
        key: jax.ShapeDtypeStruct((B, run.task.seq_len), kind)
        for key, kind in kinds.items()
      }
      first = state if name == 'train' else state['params']
      out = jax.eval_shape(getattr(functions, name), first, batch, np.int32(1))
      if name == 'train':
        assert jax.tree.map(lambda x: x.dtype, out[0]) == jax.tree.map(
          lambda x: x.dtype, state
        ), 'a step changes the types of its state'
    model = nnx.merge(graph, steps.abstract_params(run.model)[1])
    assert model.state_bytes(run.task.seq_len) > 0
    assert model.flops(run.task.seq_len) > 0
    _task(run.task)


def _task(task: tasks.Task):
  sizes = [x for x in vars(task).values() if isinstance(x, int)]
  assert task.vocab_size > 0
  if max(sizes) > DRAWN:
    return
  for split in tasks.SPLITS:
    example = task.get(0, split, 0)
    assert len(example.tokens) == task.seq_len
    assert 0 <= example.tokens.min() <= example.tokens.max() < task.vocab_size
    assert example.weights.any() or task.seq_len < 32, 'nothing is scored'
  assert 0 < task.chance <= task.ceiling <= 1


def _layer(owner: str, given: dict[str, Any]):
  config = AttentionConfig(d_model=16, num_heads=2)
  arguments = {**VARIANTS[owner].small, **given}
  build = lambda: make_attention(owner, config, rngs=nnx.Rngs(0), **arguments)
  layer = nnx.eval_shape(build)
  graph, params = nnx.split(layer)
  x = jax.ShapeDtypeStruct((2, T, 16), layer.config.dtype)

  def loss(params, x):
    return nnx.merge(graph, params)(x, step=1).astype('float32').sum()

  jax.eval_shape(jax.grad(loss), params, x)
  assert layer.state_bytes(T) > 0 and layer.flops(T) > 0

  def compute():
    x = jax.random.normal(jax.random.key(1), (2, T, 16))
    graph, params = nnx.split(build())
    grads = jax.jit(jax.grad(loss))(params, x)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads)), 'NaN'

  return compute


class Verdict(typing.NamedTuple):
  """Verdict on a case: 'accepted', 'refused', 'refused with others', 'failed'.

  Attributes:
    about: the case, and what was said.
    compute: raises where an accepted layer is not finite; None: not a layer.
  """

  name: str
  about: str
  compute: Any = None


def try_case(index: int, seed: int, found: list[Target]) -> Verdict:
  """Draws a case and tries it."""
  rng = np.random.default_rng([seed, index])
  kinds = sorted({target.kind for target in found})
  kind = kinds[rng.integers(len(kinds))]
  some = [target for target in found if target.kind == kind]
  target = some[rng.integers(len(some))]
  value = draw(rng, target.hint)
  right = is_right(value, target.hint)
  try:
    about = f'{kind} {target.owner} {target.field}={value!r:.80}'
  except ValueError:
    about = f'{kind} {target.owner} {target.field}=a large integer'
  with tempfile.TemporaryDirectory() as folder:
    try:
      compute = make(target, value, pathlib.Path(folder) / 'run')
    except REFUSALS as error:
      # As the command lines print it.
      message = ' '.join(str(error).split())
      about = f'{about}: {message}'
      where = traceback.extract_tb(error.__traceback__)[-1].filename
      said = str(ROOT) in where and '.venv' not in where and len(message) < 800
      if not said and not isinstance(error, OSError):
        return Verdict('failed', f'{about} (from {where})')
      return Verdict('refused with others' if right else 'refused', about)
    except Exception as error:
      return Verdict('failed', f'{about}: {type(error).__name__}: {error}')
  if not right:
    return Verdict('failed', f'{about} was accepted')
  return Verdict('accepted', about, compute)


CONFIG = """
from longctx.training.config import *
def get_config():
  base = {base!r}
  return to_config_dict(from_config_dict(ExperimentConfig, base))
"""


def try_process(index: int, seed: int, found: list[Target]) -> Verdict:
  """Starts train.py with a value on the command line."""
  rng = np.random.default_rng([seed, index, 1])
  some = [t for t in found if t.kind == 'experiment' and t.field != 'runs']
  target = some[rng.integers(len(some))]
  value = draw(rng, target.hint)
  text = str(value)[:100] if abs_below(value) else '9' * 30
  flag = f'--config.{target.owner}{target.field}={text}'
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tiny.py'
    path.write_text(CONFIG.format(base={**BASE, 'steps': 2}))
    argv = [f'--config={path}', f'--workdir={folder}/run', flag]
    done = subprocess.run(
      [sys.executable, str(ROOT / 'train.py'), *argv],
      capture_output=True,
      text=True,
      cwd=folder,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
      timeout=900,
    )
  error = done.stderr
  about = f'{flag}: {error.strip().splitlines()[-1:] or "trained"}'
  if done.returncode == 0 and 'Traceback' not in error:
    return Verdict('accepted', about)
  one_line = error.count('\n') == 1 and error.startswith('error: ')
  if done.returncode in (1, 2) and one_line:
    return Verdict('refused', about)
  return Verdict('failed', f'{flag}: rc {done.returncode}: {error[-800:]}')


def abs_below(value: Any) -> bool:
  """Whether Python writes an integer out."""
  return not isinstance(value, int) or abs(value) < 10**100


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=2000)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--runs', type=int, default=0)
  parser.add_argument('--processes', type=int, default=0)
  parser.add_argument('--verbose', action='store_true')
  args = parser.parse_args()
  found, begun = targets(), time.time()
  cases = itertools.chain(
    (
      (f'--first={i}', try_case(i, args.seed, found))
      for i in range(args.first, args.first + args.count)
    ),
    (
      (f'process {i}', try_process(i, args.seed, found))
      for i in range(args.first, args.first + args.processes)
    ),
  )
  counts, computed = collections.Counter(), 0
  for which, verdict in cases:
    if verdict.compute is not None and computed < args.runs:
      computed += 1
      try:
        verdict.compute()
      except Exception as error:
        verdict = Verdict(
          'failed', f'{verdict.about}: computed: {error!r:.300}'
        )
    counts[verdict.name] += 1
    if args.verbose or verdict.name == 'failed':
      line = f'{verdict.name} (--seed={args.seed} {which}): {verdict.about}'
      print(line, flush=True)
  summary = {**counts, 'fields': len(found), 'computed': computed}
  summary |= {'seconds': round(time.time() - begun), 'seed': args.seed}
  print(json.dumps(summary))
  sys.exit(bool(counts['failed']))


if __name__ == '__main__':
  main()
