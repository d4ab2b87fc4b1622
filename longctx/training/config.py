"""Experiment configs: frozen dataclasses, from and to ConfigDicts.

The dataclasses are the single source of truth. A config file starts from
`to_config_dict(ExperimentConfig(...))`, assigns what it changes, and the entry
points turn the result back with `from_config_dict`; nothing below them sees a
ConfigDict.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from ml_collections import config_dict

from longctx import parallel, tasks
from longctx.models.transformer import TransformerConfig
from longctx.parallel.layout import LAYOUTS
from longctx.training.optimizer import OptimizerConfig
from longctx.typing import (
  Between,
  Checked,
  Natural,
  Positive,
  Reason,
  Seed,
  check_multiple,
  did_you_mean,
  field_types,
  plain_types,
)

Devices = Annotated[int, Between(1, 2**16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
  """Data config: prepared datasets and worker processes.

  Attributes:
    directory: a folder written by `python -m longctx.data prepare`; empty
      makes every example on the fly.
    workers: Grain worker processes; 0 makes the examples in this process.
  """

  prefix: ClassVar[str] = 'data.'

  directory: str = ''
  workers: Annotated[int, Between(0, 1024)] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
  """Evaluation config: validations on the way and the test at the end.

  Attributes:
    every: steps between validations; 0 validates at the end only.
    batches: batches of each validation, the same ones every time.
    batch_size: rows of a batch; 0 takes the training batch size.
    test_batches: batches of the test split, measured once at the end.
  """

  prefix: ClassVar[str] = 'eval.'

  every: Natural = 200
  batches: Positive = 8
  batch_size: Natural = 0
  test_batches: Positive = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked):
  """Checkpoint config: how often the state is written, and kept.

  Attributes:
    every: steps between checkpoints; 0 writes at the end only.
    keep: how many of the newest are kept. Two or more let a run survive a
      damaged one.
  """

  prefix: ClassVar[str] = 'checkpoint.'

  every: Natural = 500
  keep: Positive = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Checked):
  """Logging config: metrics, TensorBoard and the progress bar.

  Attributes:
    every: steps averaged into one line of metrics.jsonl.
    tensorboard: also write TensorBoard events into workdir/tensorboard.
    progress: a progress bar on a terminal; otherwise a line in ten seconds.
  """

  prefix: ClassVar[str] = 'log.'

  every: Positive = 50
  tensorboard: bool = False
  progress: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(Checked):
  """Transfer config: layers that stand in the place of others learn of them.

  Attributes:
    steps: first updates, in which layers that are others than in the model of
      `init_from` learn to give the outputs of those, and nothing else learns,
      see `longctx.training.transfer`; 0: none.
  """

  prefix: ClassVar[str] = 'transfer.'

  steps: Natural = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisConfig(Checked):
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

  prefix: ClassVar[str] = 'analysis.'

  every: Natural = 0
  rows: Annotated[int, Between(1, 2**16)] = 8
  dense_every: Natural = 0
  bend: Annotated[float, Between(0, 1, open='both')] = 0.05
  ablate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Checked):
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

  prefix: ClassVar[str] = 'parallel.'

  data: Devices = 1
  seq: Devices = 1
  model: Devices = 1
  scheme: Annotated[
    Literal[tuple(parallel.SCHEMES)],
    *(Reason(x, f': {x} is a parallel.layout') for x in LAYOUTS),
  ] = 'ring'
  layout: Annotated[
    Literal[tuple(LAYOUTS)],
    *(Reason(x, f': {x} is a parallel.scheme') for x in parallel.SCHEMES),
  ] = 'zigzag'
  fsdp: bool = False

  @property
  def devices(self) -> int:
    return self.data * self.seq * self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Checked):
  """Experiment config: a task, a model and how the one learns the other.

  Attributes:
    seed: names the initial parameters and the order of the examples.
    steps: optimizer updates.
    batch_size: rows per update, over all devices and accumulation steps.
    init_from: a model whose parameters the run begins with, as far as they
      fit: a workdir, WORKDIR:STEP, or pretrained weights as
      `longctx.pretrained.open_source` takes them; empty: none.
    task: `name`, a key of `tasks.TASKS`, and fields of that task.
    runs: name -> nested overrides. Empty: one run in the workdir. Otherwise
      each named run trains in workdir/<name>, and they are compared at the end.
  """

  seed: Seed = 0
  steps: Positive = 1000
  batch_size: Positive = 32
  init_from: str = ''
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
  transfer: TransferConfig = TransferConfig()
  runs: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def eval_rows(self) -> int:
    """Rows of a batch of validation."""
    return self.eval.batch_size or self.batch_size

  def check(self):
    # With runs, each is checked as it is.
    if self.runs:
      return
    if self.transfer.steps and not self.init_from:
      raise ValueError(
        f'transfer.steps={self.transfer.steps} learns of the layers of '
        'init_from, which is empty'
      )
    if self.transfer.steps and self.optimizer.accumulation > 1:
      raise ValueError(
        f'transfer.steps={self.transfer.steps} reads a batch at once: take '
        'optimizer.accumulation=1 and a smaller batch_size'
      )
    check_multiple(self, 'batch_size', 'optimizer.accumulation')
    for name in ('batch_size', 'eval.batch_size'):
      check_multiple(self, name, 'parallel.data')


def _init_fields(cls: type) -> list[dataclasses.Field]:
  return [f for f in dataclasses.fields(cls) if f.init]


def to_config_dict(config: Any) -> config_dict.ConfigDict:
  """A dataclass instance as a ConfigDict whose fields flags can override.

  A field that may be None becomes a typed placeholder, so that
  `--config.model.head_dim=16` works where the default is None.
  """
  hints = field_types(type(config))
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
  kinds = plain_types(hint)
  if types.NoneType not in kinds:
    return value
  slot = config_dict.placeholder(kinds[0])
  slot.set(value)
  return slot


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
  hints = field_types(cls)
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
      if hints[key] == tuple[str, ...] and isinstance(value, (list, tuple)):
        # The flag parser reads `--config.model.layers=full,linear` as one name.
        value = [part for item in value for part in split_names(str(item))]
      kwargs[key] = value
  return cls(**kwargs)


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
  prefix = f'{head}.' if head else ''
  hint = did_you_mean(key, known).replace('mean ', f'mean {prefix}')
  return f'unknown config key {path}' + (
    hint or f'; known: {", ".join(sorted(known))}'
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
