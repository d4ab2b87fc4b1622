"""Device meshes: the one place where they are made.

A mesh has three axes: `data` splits the batch, `seq` the sequence, `model` the
heads and the MLP (or, under 'ring+ulysses', the sequence again).
"""

import ctypes
import glob
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ('data', 'seq', 'model')

# Virtual CPU devices take turns on few cores, so one may wait minutes for
# another; XLA would take that for a deadlock and abort after 40 seconds.
PATIENCE = (
  '--xla_cpu_collective_call_warn_stuck_timeout_seconds=3600',
  '--xla_cpu_collective_call_terminate_timeout_seconds=36000',
)


def make_mesh(data: int = 1, seq: int = 1, model: int = 1) -> Mesh:
  """A mesh over the first data * seq * model devices.

  Devices of one process, and so those with the fastest links, are neighbours
  on `model` first, then on `seq`.

  Raises:
    ValueError: there are fewer devices.
  """
  shape = (data, seq, model)
  if min(shape) < 1:
    raise ValueError(f'mesh axes must be at least 1: {data=}, {seq=}, {model=}')
  count = int(np.prod(shape))
  devices = jax.devices()
  if len(devices) < count:
    raise ValueError(
      f'a mesh of {data=} x {seq=} x {model=} needs {count} devices, and there '
      f'are {len(devices)} of kind {devices[0].device_kind}; take a smaller '
      'mesh, or start where there are more'
    )
  if count == len(devices):
    return topology_mesh(devices, *shape)
  return _mesh(np.array(devices[:count]).reshape(shape))


def topology_mesh(
  devices: Sequence[Any], data: int = 1, seq: int = 1, model: int = 1
) -> Mesh:
  """A mesh over all devices of a machine, neighbours where links are.

  Along `seq` the devices are in the order of a closed walk over links, where
  there is one: what a ring sends then crosses one link at every hop. On TPU v5e
  it is this that makes the compiler send while it computes.

  Args:
    devices: of this machine, or of one that is only described, as
      `jax.experimental.topologies` does.
    data: as in `make_mesh`, like the next ones.
    seq: devices along the sequence.
    model: devices along the heads.

  Raises:
    ValueError: the mesh has more or fewer devices.
    NotImplementedError: the devices belong to several slices.
  """
  shape = (data, seq, model)
  if int(np.prod(shape)) != len(devices):
    raise ValueError(
      f'a mesh of {data=} x {seq=} x {model=} has {int(np.prod(shape))} '
      f'devices, and the topology {len(devices)}: a mesh must fill it'
    )
  if devices[0].platform != 'tpu':
    # Every device is as near as any other of its host.
    return _mesh(np.array(devices).reshape(shape))
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  if len(slices) > 1:
    raise NotImplementedError(
      f'the devices belong to {len(slices)} slices: start on one of them'
    )
  # An axis of the mesh may have to be a part of one of the torus, as 4 of 16.
  placed = mesh_utils.create_device_mesh(
    shape, list(devices), allow_split_physical_axes=True
  )
  # One walk serves all, as the lines along `seq` are shifted copies.
  walk = closed_walk([_place(device) for device in placed[0, :, 0]])
  return _mesh(placed[:, walk])


def _place(device: Any) -> tuple[int, ...]:
  """Coordinates of a device among all; none where it has no links to know."""
  place = getattr(device, 'coords', None)
  return () if place is None else (*place, getattr(device, 'core_on_chip', 0))


def closed_walk(places: Sequence[tuple[int, ...]]) -> list[int]:
  """An order in which each of some places is a neighbour of the next.

  Args:
    places: coordinates of a grid. Where it has two sides or more, of which one
      is even, the last is a neighbour of the first too.

  Returns:
    Indices into `places`; the order as it is where there is no such grid.
  """
  unchanged = list(range(len(places)))
  sides = [sorted(set(values)) for values in zip(*places, strict=True)]
  shape = [len(side) for side in sides]
  if len(set(places)) < len(places) or math.prod(shape) != len(places):
    return unchanged
  grid = np.empty(shape, int)
  for i, place in enumerate(places):
    grid[tuple(map(list.index, sides, place))] = i
  grid = grid.squeeze()
  if grid.ndim < 2 or len(places) % 2:
    return unchanged
  # An even side first, whose rows are walked to and fro; the others as one.
  even = [n % 2 == 0 for n in grid.shape].index(True)
  grid = np.moveaxis(grid, even, 0)
  rows = np.array([_to_and_fro(row) for row in grid])
  # Down the first column, and back through the others, row by row.
  there = list(rows[::-1, 0])
  back = [row[1:][:: 1 if i % 2 == 0 else -1] for i, row in enumerate(rows)]
  return [int(i) for i in (*there, *np.concatenate(back))]


def _to_and_fro(grid: np.ndarray) -> np.ndarray:
  """All entries of a grid, each a neighbour of the next."""
  if grid.ndim == 1:
    return grid
  rows = [_to_and_fro(row) for row in grid]
  return np.concatenate(
    [row[:: 1 if i % 2 == 0 else -1] for i, row in enumerate(rows)]
  )


def _mesh(devices: np.ndarray) -> Mesh:
  # jax.make_mesh would take Explicit axes.
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def has_accelerator() -> bool:
  """Whether JAX will find a TPU or GPU, told without starting a backend.

  After a backend has started the number of virtual CPU devices is fixed, and
  with several processes `jax.distributed` cannot be initialized any more.
  """
  platforms = jax.config.jax_platforms or os.environ.get('JAX_PLATFORMS', '')
  if platforms:
    return platforms.split(',')[0] != 'cpu'

  def present(nodes: tuple[str, ...], packages: tuple[str, ...]) -> bool:
    installed = any(importlib.util.find_spec(name) for name in packages)
    return installed and any(glob.glob(node) for node in nodes)

  return present(('/dev/accel*', '/dev/vfio/[0-9]*'), ('libtpu',)) or present(
    ('/dev/nvidia[0-9]*',), ('jax_cuda12_plugin', 'jax_cuda13_plugin')
  )


def ensure_devices(count: int) -> str | None:
  """Makes virtual CPU devices where there is nothing but a CPU.

  Has to run before anything uses a device. There the process also keeps memory
  that is freed, see `_keep_one_heap`.

  Args:
    count: devices that this process should have.

  Returns:
    One line for the user where devices were made, else None.

  Raises:
    ValueError: something used a device before, and there are fewer.
  """
  if has_accelerator():
    return None
  if importlib.util.find_spec('libtpu') and not jax.config.jax_platforms:
    # The compiler of TPUs would look for one, and complain in several lines.
    jax.config.update('jax_platforms', 'cpu')
  _keep_one_heap()
  if count == 1:
    return None
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError as error:
    there = jax.local_device_count()
    if there >= count:
      return None
    raise ValueError(
      f'JAX has started with {there} of the {count=} devices, and their number '
      'is fixed: call ensure_devices before anything uses a device'
    ) from error
  known = os.environ.get('XLA_FLAGS', '')
  extra = [flag for flag in PATIENCE if flag.split('=')[0] not in known]
  os.environ['XLA_FLAGS'] = ' '.join([known, *extra]).strip()
  return (
    f'no accelerator: {count} virtual devices share {os.cpu_count()} CPU '
    'cores. Results are those of real devices, speed is not'
  )


def _keep_one_heap() -> None:
  """Tells glibc to serve all threads from one heap, and to keep what is freed.

  Each thread of each virtual device would have its own heap, whose freed blocks
  no other thread gets: 9 GB more after one step at a million tokens. And every
  call of a program would fetch its temporary memory from the system and give it
  back, page by page: a tenth of the time of a ring's pass over 8,192 tokens,
  and up to two fifths of a layer with a window, at lengths that come out badly.
  """
  options = (
    (-8, 1),  # M_ARENA_MAX of malloc.h: heaps
    (-4, 0),  # M_MMAP_MAX: blocks that come from the system one by one
    (-1, 2**30),  # M_TRIM_THRESHOLD: bytes kept at the heap's end
  )
  try:
    libc = ctypes.CDLL('libc.so.6')
    for option, value in options:
      libc.mallopt(option, value)
  except (OSError, AttributeError):
    # Another C library, with other habits.
    return
