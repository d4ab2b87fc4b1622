"""Compilation target: the machine a program is made for.

Implementations are chosen while a program is traced, and the compiler of a pod
runs on machines that have none of its chips. `compiling_for` tells the ops so.
"""

import contextlib
import dataclasses

import jax

PLATFORMS = ('cpu', 'gpu', 'tpu')


@dataclasses.dataclass(frozen=True)
class Target:
  """Target machine, by what the choice of an implementation depends on.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: of device, as JAX names it: 'TPU v5 lite', 'NVIDIA H100 80GB HBM3'.
  """

  platform: str
  kind: str = ''

  def __post_init__(self):
    if self.platform not in PLATFORMS:
      raise ValueError(f'unknown {self.platform=}; known: {PLATFORMS}')


# Part of the key of jax.jit's caches, as a global variable would not be.
_TARGET = jax.make_user_context(default_value=None)


def target() -> Target:
  """The machine that what is traced now will run on."""
  if _TARGET.value is not None:
    return _TARGET.value
  device = jax.config.jax_default_device or jax.devices()[0]
  if isinstance(device, str):
    device = jax.devices(device)[0]
  # JAX calls devices 'cuda' or 'rocm' where it calls their backend 'gpu'; what
  # it has no name for takes what runs anywhere.
  platform = {'cuda': 'gpu', 'rocm': 'gpu'}.get(
    device.platform, device.platform
  )
  return Target(
    platform if platform in PLATFORMS else 'cpu', device.device_kind
  )


def compiling_for(target: Target) -> contextlib.AbstractContextManager[None]:
  """Traces for another machine, inside of a `with` statement."""
  return _TARGET(target)
