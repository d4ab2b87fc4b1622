"""Device meshes: the one place where they are made.

A mesh has three axes: `data` splits the batch, `seq` the sequence, `model` the
heads and the MLP (or, under 'ring+ulysses', the sequence again).
"""

import ctypes
import glob
import importlib.util
import os

import jax
import numpy as np
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
  kinds = (AxisType.Auto,) * len(AXES)
  if count == len(devices):
    return jax.make_mesh(shape, AXES, axis_types=kinds)
  return Mesh(np.array(devices[:count]).reshape(shape), AXES, axis_types=kinds)


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
  """
  if has_accelerator():
    return None
  _keep_one_heap()
  if count == 1:
    return None
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    # Devices were used already: `make_mesh` says so if they are too few.
    return None
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


def join_processes(
  coordinator: str, num_processes: int | None, process_id: int | None
) -> None:
  """Makes this process one of several that train together.

  Has to run before anything uses a device.

  Args:
    coordinator: 'host:port' of the first process; 'auto' where the cluster
      tells (TPU pods, Slurm, Open MPI, Kubernetes).
    num_processes: how many there are; None with 'auto'.
    process_id: which one this is, from 0; None with 'auto'.

  Raises:
    ValueError: the three do not fit together.
  """
  if coordinator == 'auto':
    jax.distributed.initialize()
    return
  if num_processes is None or process_id is None:
    raise ValueError(
      f'{coordinator=} needs num_processes and process_id too, got '
      f'{num_processes=} and {process_id=}'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(f'need 0 <= {process_id=} < {num_processes=}')
  jax.distributed.initialize(coordinator, num_processes, process_id)
