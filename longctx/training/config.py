"""Experiment configs: frozen dataclasses, from and to ConfigDicts.

The dataclasses are the single source of truth. A config file starts from
`to_config_dict(ExperimentConfig(...))`, assigns what it changes, and the entry
points turn the result back with `from_config_dict`; nothing below them sees a
ConfigDict.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from longctx import parallel, tasks
from longctx.models.transformer import TransformerConfig
from longctx.parallel.layout import LAYOUTS
from longctx.tasks.checks import at_least, one_of
from longctx.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Data config: prepared datasets and worker processes.

  Attributes:
    directory: a folder written by `python -m longctx.data prepare`; empty
      makes every example on the fly.
    workers: Grain worker processes; 0 makes the examples in this process.
  """

  directory: str = ''
  workers: int = 0

  def __post_init__(self):
    at_least(self, 0, 'workers', prefix='data.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """Evaluation config: validations on the way and the test at the end.

  Attributes:
    every: steps between validations; 0 validates at the end only.
    batches: batches of each validation, the same ones every time.
    batch_size: rows of a batch; 0 takes the training batch size.
    test_batches: batches of the test split, measured once at the end.
  """

  every: int = 200
  batches: int = 8
  batch_size: int = 0
  test_batches: int = 16

  def __post_init__(self):
    at_least(self, 0, 'every', 'batch_size', prefix='eval.')
    at_least(self, 1, 'batches', 'test_batches', prefix='eval.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """Checkpoint config: how often the state is written, and kept.

  Attributes:
    every: steps between checkpoints; 0 writes at the end only.
    keep: how many of the newest are kept. Two or more let a run survive a
      damaged one.
  """

  every: int = 500
  keep: int = 2

  def __post_init__(self):
    at_least(self, 0, 'every', prefix='checkpoint.')
    at_least(self, 1, 'keep', prefix='checkpoint.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
  """Logging config: metrics, TensorBoard and the progress bar.

  Attributes:
    every: steps averaged into one line of metrics.jsonl.
    tensorboard: also write TensorBoard events into workdir/tensorboard.
    progress: a progress bar on a terminal; otherwise a line in ten seconds.
  """

  every: int = 50
  tensorboard: bool = False
  progress: bool = True

  def __post_init__(self):
    at_least(self, 1, 'every', prefix='log.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
  """Analysis config: how closely learning is watched, at no cost to it.

  Tasks are learned in jumps. `longctx.training.phase` tells from the training
  accuracy and the validations when a score bends, and the run looks closely
  until it has been flat for 100 steps, or for two times `dense_every`.

  Attributes:
    every: steps between analyses of heads and layers, of which there is one at
      the last step too; 0: none at all, and nothing is ablated.
    rows: sequences that are analysed, the same ones every time.
    dense_every: steps between validations, checkpoints and, where there are
      any, analyses while the score bends; 0: never denser than otherwise.
      `checkpoint.keep` holds for these checkpoints too: raise it to keep all
      that a change leaves.
    bend: difference of accuracies from which a score bends.
    ablate: whether heads that the analysis finds are ablated, once after each
      change and at the last step.
  """

  every: int = 0
  rows: int = 8
  dense_every: int = 0
  bend: float = 0.05
  ablate: bool = True

  def __post_init__(self):
    at_least(self, 0, 'every', 'dense_every', prefix='analysis.')
    at_least(self, 1, 'rows', prefix='analysis.')
    if not 0 < self.bend < 1:
      raise ValueError(f'analysis.bend={self.bend} must lie between 0 and 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
  """Mesh config: devices, and how sequences lie on them.

  The same losses come out on any mesh, up to the order of sums.

  Attributes:
    data: devices that split the batch.
    seq: devices that split the sequence.
    model: devices that split the heads and the MLP; under 'ring+ulysses' they
      split the sequence too.
    scheme: of softmax attention: 'ring', 'ulysses', 'all_gather' or
      'ring+ulysses'.
    layout: 'contiguous', 'zigzag' or 'striped'; recurrences need one of the
      first two.
    fsdp: whether parameters and optimizer state are split over `data` too.
  """

  data: int = 1
  seq: int = 1
  model: int = 1
  scheme: str = 'ring'
  layout: str = 'zigzag'
  fsdp: bool = False

  def __post_init__(self):
    at_least(self, 1, 'data', 'seq', 'model', prefix='parallel.')
    one_of(self, 'scheme', parallel.SCHEMES, prefix='parallel.')
    one_of(self, 'layout', LAYOUTS, prefix='parallel.')

  @property
  def devices(self) -> int:
    return self.data * self.seq * self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
  """Experiment config: a task, a model and how the one learns the other.

  Attributes:
    seed: names the initial parameters and the order of the examples.
    steps: optimizer updates.
    batch_size: rows per update, over all devices and accumulation steps.
    task: `name`, a key of `tasks.TASKS`, and fields of that task.
    runs: name -> nested overrides. Empty: one run in the workdir. Otherwise
      each named run trains in workdir/<name>, and they are compared at the end.
  """

  seed: int = 0
  steps: int = 1000
  batch_size: int = 32
  task: dict[str, Any] = dataclasses.field(
    default_factory=lambda: tasks.task_defaults('mqar')
  )
  model: TransformerConfig = dataclasses.field(
    default_factory=TransformerConfig
  )
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  parallel: ParallelConfig = ParallelConfig()
  data: DataConfig = DataConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  analysis: AnalysisConfig = AnalysisConfig()
  runs: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    at_least(self, 0, 'seed')
    at_least(self, 1, 'steps', 'batch_size')
    if self.batch_size % self.optimizer.accumulation:
      raise ValueError(
        f'batch_size={self.batch_size} must be a multiple of '
        f'optimizer.accumulation={self.optimizer.accumulation}'
      )


def _init_fields(cls: type) -> list[dataclasses.Field]:
  return [f for f in dataclasses.fields(cls) if f.init]


def to_config_dict(config: Any) -> config_dict.ConfigDict:
  """A dataclass instance as a ConfigDict whose fields flags can override.

  A field that may be None becomes a typed placeholder, so that
  `--config.model.head_dim=16` works where the default is None.
  """
  hints = typing.get_type_hints(type(config))
  result = config_dict.ConfigDict()
  for field in _init_fields(type(config)):
    value = getattr(config, field.name)
    result[field.name] = _slot(value, hints[field.name])
  return result


def _slot(value: Any, hint: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return to_config_dict(value)
  if isinstance(value, Mapping):
    return config_dict.ConfigDict(dict(value))
  options = _options(hint)
  if types.NoneType not in options:
    return value
  options = [option for option in options if option is not types.NoneType]
  slot = config_dict.placeholder(typing.get_origin(options[0]) or options[0])
  slot.set(value)
  return slot


def _options(hint: Any) -> tuple[Any, ...]:
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def from_config_dict(
  cls: type, config: Mapping | config_dict.ConfigDict
) -> Any:
  """Builds the frozen dataclass `cls` from a ConfigDict or a nested dict.

  Raises:
    ValueError: a key that `cls` lacks (with the closest one it has), or a
      value of the wrong type; the message names the whole path.
  """
  if isinstance(config, config_dict.ConfigDict):
    config = config.to_dict()
  return _build(cls, config, '')


def _build(cls: type, values: Mapping, path: str) -> Any:
  hints = typing.get_type_hints(cls)
  fields = [field.name for field in _init_fields(cls)]
  kwargs = {}
  for key, value in values.items():
    if key not in fields:
      raise ValueError(unknown_key(f'{path}{key}', fields))
    if cls is ExperimentConfig and key == 'task':
      kwargs[key] = tasks.task_defaults(**{'name': '', **value})
    elif dataclasses.is_dataclass(hints[key]):
      if not isinstance(value, Mapping):
        raise ValueError(f'{path}{key} must be a group of keys, got {value!r}')
      kwargs[key] = _build(hints[key], value, f'{path}{key}.')
    else:
      kwargs[key] = _coerce(value, hints[key], f'{path}{key}')
  return cls(**kwargs)


def _coerce(value: Any, hint: Any, path: str) -> Any:
  for option in _options(hint):
    origin = typing.get_origin(option) or option
    if option is Any or (value is None and option is types.NoneType):
      return value
    if origin is tuple and isinstance(value, (tuple, list)):
      return _coerce_tuple(value, typing.get_args(option), path)
    if origin is float and type(value) is int:
      return float(value)
    # bool is an int to Python, but `steps=True` is a slip.
    if type(value) is bool and origin is int:
      continue
    if isinstance(origin, type) and isinstance(value, origin):
      return value
  wanted = ' or '.join(getattr(o, '__name__', str(o)) for o in _options(hint))
  raise ValueError(f'{path}={value!r} must be {wanted}')


def _coerce_tuple(value: Any, args: tuple, path: str) -> tuple:
  if len(args) != 2 or args[1] is not Ellipsis:
    return tuple(value)
  if args[0] is str:
    # The flag parser reads `--config.model.layers=full,linear` as one name.
    value = [part for item in value for part in split_names(str(item))]
  return tuple(_coerce(item, args[0], path) for item in value)


def split_names(text: str) -> list[str]:
  """Splits at the commas outside brackets: 'a,b(x=1,y=2)' -> a | b(x=1,y=2)."""
  parts, depth = [''], 0
  for letter in text:
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and depth == 0:
      parts.append('')
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def unknown_key(path: str, known: list[str]) -> str:
  """One line on a misspelt key, naming the closest known one."""
  head, _, key = path.rpartition('.')
  close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  prefix = f'{head}.' if head else ''
  hint = f'did you mean {prefix}{close[0]}?' if close else ''
  return f'unknown config key {path}; ' + (
    hint or f'known: {", ".join(sorted(known))}'
  )


def to_dict(config: Any) -> dict[str, Any]:
  """The dataclass as nested dicts that JSON can hold."""
  return dataclasses.asdict(config)


def expand_runs(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
  """The experiments that a config stands for, by name ('' for a single one)."""
  if not config.runs:
    return {'': config}
  base = {**to_dict(config), 'runs': {}}
  expanded = {}
  for name, overrides in config.runs.items():
    if not name or '/' in name or name.startswith('.'):
      raise ValueError(f'runs: {name!r} cannot name a folder')
    try:
      expanded[name] = from_config_dict(
        ExperimentConfig, _merge(base, overrides)
      )
    except ValueError as error:
      raise ValueError(f'runs.{name}: {error}') from error
  return expanded


def _merge(base: Mapping, overrides: Mapping) -> dict:
  merged = dict(base)
  for key, value in overrides.items():
    if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
      other = 'name' in value and value['name'] != merged[key].get('name')
      # The fields of one task mean nothing to another.
      merged[key] = _merge({} if other else merged[key], value)
    else:
      merged[key] = value
  return merged


def differences(a: Mapping, b: Mapping, path: str = '') -> list[str]:
  """Paths at which two nested dicts differ, as 'path: a -> b'."""
  found = []
  for key in sorted({*a, *b}):
    left, right = a.get(key), b.get(key)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
      found += differences(left, right, f'{path}{key}.')
    elif left != right:
      found.append(f'{path}{key}: {left!r} -> {right!r}')
  return found
