"""Warm start: a run that begins with the parameters of another model."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from longctx import tasks
from longctx.models import TransformerConfig, abstract_params
from longctx.parallel import Placement
from longctx.pretrained.loading import flatten, read_config, read_parameters
from longctx.pretrained.source import Source, open_source
from longctx.training import config as config_lib
from longctx.training import metrics, runs, steps
from longctx.training.checkpoint import Checkpointer
from longctx.training.config import ExperimentConfig
from longctx.training.errors import CheckpointError
from longctx.training.transfer import Teacher, exchanged_layers

# Tables whose rows are tokens or positions, and the axis of those: one with
# more of them takes what there is.
TABLES = {'embedding': 0, 'position_table': 0, 'head': 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """Origin of a warm start: a model whose parameters are taken.

  Attributes:
    name: as the config names it.
    config: of the model.
    shapes: of its parameters, by path.
    source: pretrained weights; None: a workdir's.
    workdir: which holds its checkpoints.
    step: of the checkpoint; None: the newest.
  """

  name: str
  config: TransformerConfig
  shapes: dict[str, tuple[int, ...]]
  source: Source | None = None
  workdir: pathlib.Path | None = None
  step: int | None = None

  def parameters(self) -> Iterable[tuple[str, Any]]:
    """Yields each parameter's path and value."""
    abstract = abstract_params(self.config)[1]
    if self.source is not None:
      yield from read_parameters(self.source, self.config, flatten(abstract))
      return
    folder = self.workdir / 'checkpoints'
    with contextlib.closing(Checkpointer(folder, say=metrics.say)) as opened:
      restored = opened.restore(params=abstract, step=self.step)
    if restored is None:
      raise CheckpointError(f'there is no checkpoint in {self.workdir}')
    yield from flatten(restored.params).items()


def open_origin(name: str) -> Origin:
  """Opens what `ExperimentConfig.init_from` names.

  Args:
    name: a workdir, WORKDIR:STEP, or what `pretrained.open_source` takes.

  Raises:
    ValueError: neither is there, or no model can be made of it.
    CheckpointError: a workdir that has not saved this step, or any.
    OSError, DamagedFileError: a workdir whose config cannot be read.
  """
  folder, _, step = name.rpartition(':')
  if not (folder and step.isdigit()):
    folder, step = name, ''
  workdir = pathlib.Path(folder).expanduser()
  if (workdir / 'checkpoints').is_dir():
    pattern = str(int(step)) if step else '[0-9]*'
    if not any((workdir / 'checkpoints').glob(pattern)):
      raise CheckpointError(f'init_from={name!r}: there is no such checkpoint')
    run = runs.read_config(workdir)
    model = run.model
    if not model.vocab_size or model.position_encoding == 'learned':
      model = runs.resolve_model(model, tasks.make_task(**run.task))
    origin = dict(workdir=workdir, step=int(step) if step else None)
  elif (
    workdir.is_dir()
    and (workdir / 'config.json').exists()
    and list(workdir.glob('*/checkpoints'))
  ):
    names = ', '.join(p.parent.name for p in workdir.glob('*/checkpoints'))
    raise ValueError(
      f'init_from={name!r} holds several runs: name one of {names}, as in '
      f'{name}/RUN'
    )
  else:
    source = open_source(name)
    model, origin = read_config(source), dict(source=source)
  shapes = {
    path: leaf.shape
    for path, leaf in flatten(abstract_params(model)[1]).items()
  }
  return Origin(name=name, config=model, shapes=shapes, **origin)


def check(run: runs.Run) -> None:
  """Raises ValueError where a run cannot begin as its config says."""
  if run.config.init_from and not any(
    (run.workdir / 'checkpoints').glob('[0-9]*')
  ):
    origin = open_origin(run.config.init_from)
    fit(origin, flatten(abstract_params(run.model)[1]))
    if run.config.transfer.steps:
      exchanged_layers(origin.config, run.model)


class Fit(NamedTuple):
  """Fit of a model to an origin: paths of what is taken, and of what is not.

  Attributes:
    taken: whole.
    grown: tables of which some rows are taken.
    new: initialised.
    left: of the origin, and not used.
  """

  taken: list[str]
  grown: list[str]
  new: list[str]
  left: list[str]


def fit(origin: Origin, leaves: dict[str, Any]) -> Fit:
  """What a model can take.

  Args:
    origin: of the parameters.
    leaves: of the model, by path.

  Raises:
    ValueError: nothing.
  """
  found = Fit([], [], [], [])
  for path, shape in origin.shapes.items():
    if path not in leaves:
      found.left.append(path)
      continue
    wanted, axis = leaves[path].shape, TABLES.get(path)
    others = lambda s, axis=axis: (*s[:axis], *s[axis + 1 :])
    if shape == wanted:
      found.taken.append(path)
    elif axis is not None and others(shape) == others(wanted):
      found.grown.append(path)
    else:
      found.left.append(path)
  found.new.extend(sorted(leaves.keys() - {*found.taken, *found.grown}))
  if not found.taken:
    raise ValueError(
      f'init_from={origin.name!r} has nothing that fits: its model is '
      f'd_model={origin.config.d_model}, layers={len(origin.config.layers)}'
    )
  return found


def start(
  model: TransformerConfig,
  config: ExperimentConfig,
  *,
  placement: Placement | None = None,
) -> steps.State:
  """The state before the first update, with what fits of `config.init_from`.

  What is taken, new, left and other is said in lines. Only where something is
  new is a model initialised.
  """
  place = dict(placement=placement)
  origin = open_origin(config.init_from)
  params = steps.abstract_state(model, config, **place)['params']
  fitting = fit(origin, flatten(params))
  for line in report(origin, model, flatten(params), fitting):
    metrics.say(line)
  if fitting.new or fitting.grown:
    params = steps.init_state(model, config, **place)['params']
  leaves, tree = flatten(params), jax.tree.structure(params)
  del params
  whole, tables = set(fitting.taken), set(fitting.grown)
  for path, value in origin.parameters():
    if path in whole:
      leaves[path] = _like(value, leaves[path])
    elif path in tables:
      axis, old = TABLES[path], np.array(leaves[path])
      rows = min(value.shape[axis], old.shape[axis])
      part = (slice(None),) * axis + (slice(rows),)
      old[part] = np.asarray(value)[part]
      leaves[path] = _like(old, leaves[path])
  return steps.state_of(
    jax.tree.unflatten(tree, leaves.values()), config, placement
  )


def teacher(
  origin: Origin,
  exchanged: tuple[int, ...],
  config: ExperimentConfig,
  placement: Placement | None,
) -> Teacher:
  """The origin's own model, of which some layers are exchanged."""
  graph, abstract = abstract_params(origin.config)
  leaves = dict(origin.parameters())
  params = jax.tree.unflatten(
    jax.tree.structure(abstract), map(leaves.get, flatten(abstract))
  )
  places = None
  if placement is not None:
    places = placement.state_shardings(params, fsdp=config.parallel.fsdp)
  return Teacher(
    graph=graph, params=jax.device_put(params, places), exchanged=exchanged
  )


def _like(value: Any, leaf: Any) -> jax.Array:
  return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)


def report(
  origin: Origin,
  model: TransformerConfig,
  leaves: dict[str, Any],
  fitting: Fit,
) -> list[str]:
  """What a warm start takes, what is new, what is left, what differs."""
  size = lambda paths: sum(leaves[path].size for path in paths)
  lines = [
    f'init_from={origin.name}: takes {len(fitting.taken)} arrays, '
    f'{size(fitting.taken):,} numbers'
  ]
  for path in fitting.grown:
    axis = TABLES[path]
    have, want = origin.shapes[path][axis], leaves[path].shape[axis]
    lines.append(f'  takes {min(have, want):,} rows of {path}, of {want:,}')
  if fitting.new:
    lines.append(
      f'  new, initialised: {size(fitting.new):,} numbers in '
      f'{_grouped(fitting.new)}'
    )
  if fitting.left:
    lines.append(f'  left: {_grouped(fitting.left)}')
  old, new = map(dataclasses.asdict, (origin.config, model))
  changed = config_lib.differences(old, new)
  if changed:
    lines.append(f'  differs: {"; ".join(changed)}')
  return lines


def _grouped(paths: list[str]) -> str:
  """Paths, those of several blocks as one: 'blocks/{0,2}/mlp/up/kernel'."""
  groups: dict[str, list[str]] = {}
  for path in paths:
    block = re.match(r'blocks/(\d+)/', path)
    rest = path[block.end() :] if block else path
    groups.setdefault(rest, []).append(block[1] if block else '')
  return ', '.join(
    f'blocks/{{{",".join(sorted(numbers, key=int))}}}/{rest}'
    if numbers[0]
    else rest
    for rest, numbers in groups.items()
  )
