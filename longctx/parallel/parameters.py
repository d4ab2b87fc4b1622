"""Parameter sharding (FSDP): one rule for parameters and optimizer state.

Along `model` (tensor parallelism, arXiv:1909.08053) the projections into heads
and into the MLP are split by what they make, those back and those within a head
by what they read, so that a head and its MLP columns stay on one device. Along
`data`, where asked for (FSDP, ZeRO-3, arXiv:1910.02054), every array is split
along its largest axis that divides. All else is on every device.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Split along their last axis, and along their first; names in a path.
COLUMNS = frozenset(
  {
    *('query', 'key', 'value', 'query_conv', 'key_conv', 'value_conv'),
    *('query_global', 'key_global', 'value_global'),
    *('gate', 'gate_up', 'decay_up', 'beta', 'dt'),
    'up',
  }
)
ROWS = frozenset({'out', 'down', 'query_features', 'key_features'})

# Smaller arrays cost more to gather than to keep.
LEAST_TO_SPLIT = 1024


def parameter_spec(
  path: tuple[str, ...],
  shape: tuple[int, ...],
  *,
  data: int = 1,
  model: int = 1,
) -> P:
  """The partition of one array.

  Args:
    path: names on the way to it, as in ('blocks', '0', 'mlp', 'up', 'kernel').
    shape: of the array.
    data: devices to split it over along `data`; 1 for none.
    model: devices on `model` that split heads and the MLP; 1 for none.
  """
  axes: list[str | None] = [None] * len(shape)
  names = set(path)
  if model > 1 and len(shape) >= 2:
    axis = -1 if names & COLUMNS else 0 if names & ROWS else None
    if axis is not None and shape[axis] % model == 0:
      axes[axis] = 'model'
  size = 1
  for n in shape:
    size *= n
  if data > 1 and size >= LEAST_TO_SPLIT:
    free = [i for i, n in enumerate(shape) if axes[i] is None and n % data == 0]
    if free:
      axes[max(free, key=lambda i: shape[i])] = 'data'
  return P(*axes)


def state_shardings(state: Any, mesh: Mesh, *, data: int, model: int) -> Any:
  """A sharding per array of a training state.

  Optimizer state follows the parameters, whose paths its own paths end in.

  Args:
    state: a tree of arrays or ShapeDtypeStructs.
    mesh: from `make_mesh`.
    data: as in `parameter_spec`.
    model: as in `parameter_spec`.
  """

  def sharding(path, x):
    names = tuple(
      str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
      for k in path
    )
    spec = parameter_spec(names, x.shape, data=data, model=model)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, state)
