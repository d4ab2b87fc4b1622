"""The way of the queries from the loss to a kernel: frames, and their files.

    python -m tests.models.test_journey

prints it, as a reader would step through it in training.
"""

import pathlib
import traceback

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl

import longctx
from longctx import parallel
from longctx.models import Transformer, TransformerConfig
from longctx.parallel import Placement
from longctx.parallel.layout import SequenceLayout

T = 512
ROOT = pathlib.Path(longctx.__file__).parent


def journey(shards: int) -> list[tuple[str, str]]:
  """(file, function) from `Transformer.loss` to the forward kernel's launch."""
  config = TransformerConfig(
    vocab_size=8,
    layers=('full',),
    d_model=256,
    num_heads=2,
    implementation='pallas',
  )
  placement = None
  if shards > 1:
    mesh = parallel.make_mesh(seq=shards)
    placement = Placement(mesh, SequenceLayout('zigzag', T, shards), 'ring')
  graph, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
  stacks, launch = [], pl.pallas_call

  def pallas_call(*args, **options):
    stacks.append(traceback.extract_stack())
    return launch(*args, **options)

  def loss(params):
    tokens = jnp.zeros((1, T), jnp.int32)
    model, weights = nnx.merge(graph, params), jnp.ones(tokens.shape)
    return model.loss(tokens, tokens, weights, placement=placement)['loss']

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pl, 'pallas_call', pallas_call)
    jax.eval_shape(jax.grad(loss), params)
  frames = [
    (str(pathlib.Path(frame.filename).relative_to(ROOT)), frame.name)
    for frame in stacks[0]
    if ROOT in pathlib.Path(frame.filename).parents
  ]
  return frames[frames.index(('models/transformer.py', 'loss')) :]


@pytest.mark.parametrize('shards', [1, 4])
def test_queries_reach_the_kernel_by_few_frames(shards):
  frames = journey(shards)
  assert len(frames) <= 18, frames
  assert len({file for file, _ in frames}) <= 10, frames


if __name__ == '__main__':
  parallel.ensure_devices(4)
  for shards in (1, 4):
    frames = journey(shards)
    files = {file for file, _ in frames}
    print(f'{shards} devices: {len(frames)} frames in {len(files)} files')
    print(*(f'  {file} {name}' for file, name in frames), sep='\n')
