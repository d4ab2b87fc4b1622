"""Ahead-of-time compilation of a training step, for a machine elsewhere."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import parallel, tasks
from longctx.costs.chips import Chip
from longctx.costs.memory import totals
from longctx.models.transformer import Transformer, TransformerConfig
from longctx.ops.target import Target, compiling_for
from longctx.parallel import Placement
from longctx.plan.topologies import check_mesh
from longctx.training import config as config_lib
from longctx.training import runs, steps
from longctx.training.config import ExperimentConfig

DTYPES = {
  'tokens': jnp.int32,
  'labels': jnp.int32,
  'weights': jnp.float32,
  'segment_ids': jnp.int32,
  'relevant': jnp.bool_,
}


@dataclasses.dataclass(frozen=True)
class Step:
  """Training step, traced and ready to compile.

  Attributes:
    model: with the vocabulary resolved.
    module: the model, without values.
    state: as ShapeDtypeStructs with shardings, as `steps.State`.
    batch: likewise.
  """

  config: ExperimentConfig
  task: tasks.Task
  model: TransformerConfig
  module: Transformer
  placement: Placement
  state: Any
  batch: Any
  lowered: Any


@dataclasses.dataclass(frozen=True)
class Program:
  """Compiled program of a step: its text and memory.

  Attributes:
    dump: what else it wrote, by the end of the name of a file.
    argument_bytes: of one device, like the next ones.
    output_bytes: of results that do not take the place of arguments.
    temporary_bytes: of what lies between.
    refusal: why the compiler gave up; '' where it did not.
  """

  text: str
  dump: dict[str, str]
  argument_bytes: int
  output_bytes: int
  temporary_bytes: int
  code_bytes: int
  refusal: str = ''


def find_run(config: ExperimentConfig, name: str) -> ExperimentConfig:
  """One run of an experiment.

  Raises:
    ValueError: there is none of that name, or a name is needed.
  """
  found = config_lib.expand_runs(config)
  if not name and len(found) == 1:
    return next(iter(found.values()))
  if name not in found:
    raise ValueError(
      f'unknown run {name!r}: take one of --run={", --run=".join(found)}'
    )
  return found[name]


def trace(
  config: ExperimentConfig,
  topology: str,
  devices: Sequence[Any],
  chip: Chip,
) -> Step:
  """Traces a training step for the devices of a topology.

  Raises:
    ValueError, NotImplementedError: what training would refuse too, or a mesh
      that does not fill the topology.
  """
  task = tasks.make_task(**config.task)
  model = runs.resolve_model(config.model, task)
  runs.check_task(config, task, model)
  layout = config.parallel
  shape = (layout.data, layout.seq, layout.model)
  heads = 1 if layout.scheme == 'ring+ulysses' else _key_heads(model)
  check_mesh(topology, devices, shape, batch=config.batch_size, heads=heads)
  placement = runs.make_placement(
    layout, task.seq_len, mesh=parallel.topology_mesh(devices, *shape)
  )
  # Shardings would refuse the batch in JAX's words.
  placement.axes.check(batch=config.batch_size)
  state = steps.abstract_state(model, config, placement=placement)
  batch = _batch(config, task, placement)
  graph, params = steps.abstract_params(model)
  functions = steps.make_steps(graph, config, placement=placement)
  with compiling_for(Target(chip.platform, chip.kind)):
    lowered = functions.train.lower(
      state, batch, jax.ShapeDtypeStruct((), jnp.int32)
    )
  return Step(
    config,
    task,
    model,
    nnx.merge(graph, params),
    placement,
    state,
    batch,
    lowered,
  )


def _key_heads(model: TransformerConfig) -> int:
  return model.num_kv_heads or model.num_heads


def _batch(config: ExperimentConfig, task: tasks.Task, placement: Placement):
  """ShapeDtypeStructs of the arrays that a batch of a task has."""
  shape = (config.batch_size, placement.layout.padded_len)
  return {
    name: jax.ShapeDtypeStruct(shape, DTYPES[name], sharding=placement.sharding)
    for name in _fields(config, task)
  }


def _fields(config: ExperimentConfig, task: tasks.Task) -> list[str]:
  """What an example holds, told by one as short as the task allows."""
  seq_len = 16
  while seq_len < task.seq_len:
    try:
      short = dataclasses.replace(task, seq_len=seq_len)
      return list(short.get(config.seed, 'train', 0).arrays())
    except ValueError:
      seq_len *= 2
  return list(task.get(config.seed, 'train', 0).arrays())


def compile_step(step: Step) -> Program:
  """Compiles a step, and reads what the compiler wrote on the way.

  A program that does not fit is refused only once its memory is laid out, so
  that there is a text to read then too.
  """
  # A program from the cache would leave nothing to read.
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    with tempfile.TemporaryDirectory(prefix='longctx-plan-') as folder:
      options = {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
      try:
        compiled = step.lowered.compile(compiler_options=options)
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        return _refused(str(error), _read(folder))
      dump = _read(folder)
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)
  memory = compiled.memory_analysis()
  return Program(
    compiled.as_text(),
    dump,
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
  )


# Ends of the names of files that tell how memory was laid out.
ASSIGNMENT = 'after_optimizations-buffer-assignment.txt'
LIVE_RANGE = 'after_optimizations-live-range.txt'
SCHEDULED = 'after_optimizations.txt'


def _read(folder: str) -> dict[str, str]:
  """The files of the largest program that was compiled into a folder."""
  found = {}
  for end in (ASSIGNMENT, LIVE_RANGE, SCHEDULED):
    files = pathlib.Path(folder).glob(f'*{end}')
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    found[end] = largest.read_text() if largest else ''
  return found


def _refused(message: str, dump: dict[str, str]) -> Program:
  sizes = totals(dump[ASSIGNMENT])
  return Program(
    dump[SCHEDULED],
    dump,
    sizes['arguments'],
    sizes['outputs'],
    sizes['temporaries'],
    0,
    ' '.join(message.split()),
  )
