"""What the TPU compiler makes of the kernels, on a machine without a TPU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --chips=v5p,v6e --ops=attention
    python benchmarks/kernels.py --quick

Prints a JSON line per chip and kernel, bfloat16, forward and backward:

    vmem_bytes   of a core's vector memory, double buffers included
    bundles      instructions of the whole kernel; each is one cycle at best
    full         those of a block whose pairs are all allowed (attention)
    partial      those of a block with an element mask (attention)

and a line per chip and mask: `loaded` and `needed`, the blocks of a work list
and those that hold an allowed pair, `area`, their scores over those of all
pairs, and `pairs`, the allowed pairs over all.

Bundles say what a block costs if nothing waits for memory. They are counted
without a device, so that a slower kernel is seen where there is none: the tests
hold them to tests/ops/kernel_limits.json, which `--chips=v5p
--write=tests/ops/kernel_limits.json` renews. With `--quick` small arrays, and
the forward pass of attention on one chip alone.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import tempfile

# Before the compiler is loaded.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['LIBTPU_INIT_ARGS'] = ' '.join(
  [
    '--xla_jf_dump_to=' + tempfile.mkdtemp(prefix='bundles'),
    '--xla_jf_dump_llo_text=true',
    '--xla_jf_dump_llo_pass_label_regex=final',
  ]
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from longctx.masks import Causal, SlidingWindow
from longctx.ops.dot_product_attention import (
  BlockSizes,
  TokenIndices,
  dot_product_attention,
)
from longctx.ops.dot_product_attention.pallas_tpu_tiling import make_tiling
from longctx.ops.dot_product_attention.pallas_tpu_work_list import (
  make_flat_list,
)
from longctx.ops.recurrence import gated_delta_rule, linear_attention
from longctx.ops.target import Target, compiling_for
from longctx.plan import topologies

DUMPS = pathlib.Path(os.environ['LIBTPU_INIT_ARGS'].split()[0].split('=')[1])

CHIPS = {
  'v5e': 'v5e:2x4',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x4',
  'tpu7x': 'tpu7x:2x2x1',
}
MASKS = {'causal': Causal(), 'window of 1024': SlidingWindow(1023)}


def attention(shape):
  T, N, K, H = shape
  return dot_product_attention, [(T, N, H), (T, K, H), (T, K, H)], {}


def linear(shape):
  T, N, K, H = shape
  arrays = [(T, N, H), (T, N, H), (T, N, H)]
  return linear_attention, arrays, {'log_decay': (T, N)}


def delta(shape):
  T, N, K, H = shape
  arrays = [(T, N, H), (T, N, H), (T, N, H), (T, N)]
  return gated_delta_rule, arrays, {'log_decay': (T, N)}


OPS = {'attention': attention, 'linear': linear, 'delta': delta}


def compiled(op: str, chip: str, shape: tuple[int, ...], *, backward: bool):
  """An op's program for a chip."""
  device = topologies.describe(CHIPS[chip])[0]
  sharding = SingleDeviceSharding(device)

  def array(shape, dtype='bfloat16'):
    return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=sharding)

  function, arrays, named = OPS[op](shape)
  arrays = [array(x) for x in arrays]
  named = {name: array(x, 'float32') for name, x in named.items()}

  def loss(arrays, named):
    out = function(*arrays, **named, implementation='pallas')
    return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(out))

  run = jax.grad(loss) if backward else loss
  mesh = Mesh(np.array([device]), ('x',))
  target = Target('tpu', device.device_kind)
  with (
    compiling_for(target),
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  ):
    return jax.jit(run).lower(arrays, named).compile()


def vmem_bytes(program: str) -> dict[str, int]:
  """By kernel, of a compiled program's text."""
  found = {}
  for line in program.splitlines():
    if 'custom_call_target="tpu_custom_call"' not in line:
      continue
    name = re.match(r'\s*(?:ROOT )?%([\w\-]+?)(?:\.\d+)* = ', line)[1]
    size = re.search(
      r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+",'
      r'"size":"(\d+)"',
      line,
    )
    found[name] = max(found.get(name, 0), int(size[1]))
  return found


def bundles(text: str) -> dict[str, int]:
  """Of a kernel's last instructions: all of them, and those of blocks."""
  address, starts, regions = 0, {}, []
  for line in text.splitlines():
    if numbered := re.match(r'\s*(0x[0-9a-f]+|0) +(?:[A-Z]{2} *)?:', line):
      address = int(numbered[1], 16)
    for event, region in re.findall(r'/?\b(Start|End) region (\d+)', line):
      if event == 'Start':
        starts[region] = address
      elif region in starts:
        regions.append((starts.pop(region), address + 1))
  size = lambda region: region[1] - region[0]

  def is_block(region):
    """Not made of a few large ones."""
    inside = [
      size(other)
      for other in regions
      if region[0] <= other[0] and other[1] <= region[1] and other != region
    ]
    return max(inside, default=0) < size(region) / 4

  blocks = sorted(filter(is_block, regions), key=size)[-2:]
  blocks = [size(block) for block in sorted(blocks)]
  return {
    'bundles': address + 1,
    **dict(zip(('partial', 'full'), blocks, strict=False)),
  }


def kernels(op: str, chip: str, shape, *, backward: bool) -> list[dict]:
  """A line per kernel of an op."""
  for path in DUMPS.iterdir():
    path.unlink()
  program = compiled(op, chip, shape, backward=backward).as_text()
  lines = []
  for name, size in vmem_bytes(program).items():
    paths = DUMPS.glob(f'*-{name}*[0-9]-final_bundles.txt')
    found = [bundles(path.read_text(errors='replace')) for path in paths]
    largest = max(found, key=lambda one: one['bundles'])
    if op != 'attention':
      largest = {'bundles': largest['bundles']}
    lines.append(dict(chip=chip, kernel=name, vmem_bytes=size, **largest))
  return lines


def work(chip: str, name: str, T: int) -> list[dict]:
  """What the lists of a mask make the kernels load and compute."""
  mask, lines = MASKS[name], []
  kind = topologies.find_chip(CHIPS[chip]).kind
  for backward in (False, True):
    t = make_tiling(
      mask,
      (1, T, T, 1, 1),
      BlockSizes(),
      kind=kind,
      wide=False,
      backward=backward,
    )
    found = make_flat_list(mask, t, TokenIndices(), by_column=backward)
    kinds = mask.block_map(T, T, t.block_q, t.block_k)
    lines.append(
      dict(
        chip=chip,
        mask=name,
        T=T,
        backward=backward,
        block_q=t.block_q,
        block_k=t.block_k,
        loaded=int(found.count.sum()),
        needed=int(np.count_nonzero(kinds)),
        area=int(found.count.sum()) * t.block_q * t.block_k / T**2,
        pairs=mask.num_allowed(T, T) / T**2,
      )
    )
  return lines


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--chips', default=','.join(CHIPS))
  parser.add_argument('--ops', default=','.join(OPS))
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--write', help='a file for the lines of kernels')
  args = parser.parse_args()
  chips, ops = args.chips.split(','), args.ops.split(',')
  if args.quick:
    chips, ops = ['v5e'], ['attention']
  shape = (2048, 2, 1, 128) if args.quick else (4096, 8, 2, 128)
  limits = {}
  for chip in chips:
    lines = [
      line
      for op in ops
      for line in kernels(op, chip, shape, backward=not args.quick)
    ]
    for name in MASKS:
      lines += work(chip, name, 2**14 if args.quick else 2**16)
    for line in lines:
      print(json.dumps(line), flush=True)
      if 'kernel' in line:
        limits[f'{line.pop("chip")} {line.pop("kernel")}'] = line
  if args.write:
    pathlib.Path(args.write).write_text(json.dumps(limits, indent=2) + '\n')


if __name__ == '__main__':
  try:
    main()
  finally:
    shutil.rmtree(DUMPS)
