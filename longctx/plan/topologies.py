"""TPU and GPU topologies, as compilers describe them, without the machine.

A TPU's compiler is in libtpu, a GPU's in JAX's CUDA plugin; both run anywhere.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from longctx.costs.chips import CHIPS, Chip

# libtpu looks for the machine that it runs on, and has to be told that there is
# none; two processes may share it, as nobody owns a chip.
LIBTPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  # Its log, from errors on.
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
}

# What XLA has to know of a GPU, as a text proto of GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def find_chip(topology: str) -> Chip:
  """What a device of a topology has.

  Args:
    topology: its name, as in 'v5p:4x4x8' or 'h100:8'.

  Raises:
    ValueError: there is no such machine.
  """
  generation, colon, shape = topology.partition(':')
  if generation not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', shape):
    examples = ', '.join(chip.example for chip in CHIPS.values())
    raise ValueError(
      f'unknown topology {topology!r}: write generation:shape, as in {examples}'
    )
  return CHIPS[generation]


def has_tpu_compiler() -> bool:
  """Whether programs for TPUs can be compiled here."""
  return importlib.util.find_spec('libtpu') is not None


def describe(topology: str) -> list[Any]:
  """All devices of a topology; nothing can run on them.

  Raises:
    ValueError: there is no such machine, or its compiler is not installed.
  """
  chip = find_chip(topology)
  shape = topology.partition(':')[2]
  if chip.platform == 'gpu':
    return _gpus(topology, shape)
  if not has_tpu_compiler():
    raise ValueError(
      f"{topology} needs the TPU compiler: pip install -e '.[tpu]'"
    )
  for name, value in LIBTPU.items():
    os.environ.setdefault(name, value)
  try:
    return list(topologies.get_topology_desc(topology, 'tpu').devices)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0].partition(': ')[2]
    raise ValueError(
      f'the compiler knows no topology {topology!r} ({reason}); try '
      f'{chip.example}'
    ) from error


def _gpus(topology: str, shape: str) -> list[Any]:
  plugins = [
    name
    for name in ('jax_cuda13_plugin', 'jax_cuda12_plugin')
    if importlib.util.find_spec(name)
  ]
  if not plugins:
    raise ValueError(
      f"{topology} needs the CUDA compiler: pip install -e '.[cuda]', 4.4 GB"
    )
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  count = math.prod(map(int, shape.split('x')))
  # The plugin registers when a backend starts.
  jax.devices()
  # Partitions, hosts of a partition, devices of a host.
  hosts, local = (count // 8, 8) if count % 8 == 0 else (1, count)
  return list(
    topologies.get_topology_desc(
      'h100', 'cuda', topology=f'1x{hosts}x{local}', target_config=H100
    ).devices
  )


def meshes(count: int, *, batch: int, heads: int) -> list[tuple[int, int, int]]:
  """(data, seq, model) of meshes that fill `count` devices, longest seq first.

  Args:
    batch: rows, which data has to divide.
    heads: key heads, which model has to divide.
  """
  found = []
  for data in _divisors(count):
    for model in _divisors(count // data):
      if batch % data == 0 and heads % model == 0:
        found.append((data, count // data // model, model))
  return sorted(found, key=lambda mesh: (mesh[2], -mesh[1]))


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def check_mesh(
  topology: str,
  devices: Sequence[Any],
  mesh: tuple[int, int, int],
  *,
  batch: int,
  heads: int,
) -> None:
  """Refuses a mesh that leaves devices of a topology out.

  Raises:
    ValueError: with meshes that fill it.
  """
  data, seq, model = mesh
  if data * seq * model == len(devices):
    return
  fitting = meshes(len(devices), batch=batch, heads=heads)[:4]
  offers = ', or '.join(
    f'--config.parallel.data={d} --config.parallel.seq={s} '
    f'--config.parallel.model={m}'
    for d, s, m in fitting
  )
  raise ValueError(
    f'{topology} has {len(devices)} devices, and the mesh {data=} x {seq=} x '
    f'{model=} has {data * seq * model}: take {offers}'
  )


def longest_hop(devices: Any, *, wraps: int, axis: int) -> int | None:
  """Links between neighbours along an axis of a mesh, at most.

  Args:
    devices: of the mesh, an array [data, seq, model].
    axis: of the mesh; its ends are neighbours too.

  Returns:
    None where devices have no coordinates.
  """
  first = devices.flat[0]
  if not wraps or not hasattr(first, 'coords'):
    return None
  places = [tuple(device.coords) for device in devices.flat]
  sizes = [max(values) + 1 for values in zip(*places, strict=True)]

  def links(a, b):
    total = 0
    for x, y, size in zip(a, b, sizes, strict=True):
      apart = abs(x - y)
      total += min(apart, size - apart) if size % wraps == 0 else apart
    return total

  lines = devices.swapaxes(axis, -1).reshape(-1, devices.shape[axis])
  return max(
    links(line[i].coords, line[i - 1].coords)
    for line in lines
    for i in range(len(line))
  )
