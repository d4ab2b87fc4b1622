"""Chip specifications of TPUs and GPUs: memory, FLOP/s, links.

A device is what JAX calls one: a chip, of TPU7x half a chip.
"""

import dataclasses

GiB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Chip, or rather what JAX calls a device.

  Attributes:
    kind: as JAX names it.
    platform: 'tpu' or 'gpu'.
    usable_bytes: those that the compiler lets a program have.
    flops: per second, dense bfloat16, at the peak.
    link_bandwidth: bytes per second over one link, one way.
    wraps: a torus closes along the dimensions that this number divides; 0:
      every device is as near as any other.
    example: a topology.
  """

  kind: str
  platform: str = 'tpu'
  usable_bytes: int
  flops: float
  link_bandwidth: float
  wraps: int
  example: str


# Memory, FLOP/s and bandwidths: the pages of Google Cloud's documentation on
# each TPU ('TPU v5e', 'TPU v5p', 'TPU v6e', 'TPU7x'); links: 'How to Scale Your
# Model', jax-ml.github.io/scaling-book, 'All About TPUs'. The usable bytes are
# those that libtpu 0.0.42 names when it refuses a program.
CHIPS = {
  'v5e': Chip(
    kind='TPU v5 lite',
    usable_bytes=int(15.75 * GiB),
    flops=197e12,
    link_bandwidth=45e9,
    wraps=16,
    example='v5e:4x8',
  ),
  'v5p': Chip(
    kind='TPU v5',
    usable_bytes=int(95.74 * GiB),
    flops=459e12,
    link_bandwidth=90e9,
    wraps=4,
    example='v5p:4x4x8',
  ),
  'v6e': Chip(
    kind='TPU v6 lite',
    usable_bytes=int(31.25 * GiB),
    flops=918e12,
    link_bandwidth=90e9,
    wraps=16,
    example='v6e:4x8',
  ),
  # A chip of 192 GB, 2307 TFLOP/s and 7370 GB/s, as two devices. Its links are
  # taken to be those of v6e, which was not found written anywhere.
  'tpu7x': Chip(
    kind='TPU7x',
    usable_bytes=int(94.75 * GiB),
    flops=2307e12 / 2,
    link_bandwidth=90e9,
    wraps=4,
    example='tpu7x:4x4x4',
  ),
  # NVIDIA's data sheet of the H100 SXM; NVLink gives 900 GB/s both ways. JAX
  # takes three quarters of the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION
  # says otherwise.
  'h100': Chip(
    kind='NVIDIA H100 80GB HBM3',
    platform='gpu',
    usable_bytes=int(0.75 * 84_978_434_048),
    flops=989e12,
    link_bandwidth=450e9,
    wraps=0,
    example='h100:8',
  ),
}
