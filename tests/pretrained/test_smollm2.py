"""SmolLM2-135M: a real model, where `fetch smollm2` has brought it."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.decoding import cache as cache_lib
from longctx.parallel import Placement, make_mesh
from longctx.parallel.layout import SequenceLayout
from longctx.pretrained import fetch
from longctx.pretrained.loading import load
from tests.pretrained.make_fixtures import FOLDER

CACHE = pathlib.Path(os.environ['LONGCTX_USER_CACHE']).expanduser()
FILE = CACHE / 'smollm2' / fetch.WHEELS['smollm2'].file

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not FILE.is_file(),
    reason='not here: python -m longctx.pretrained fetch smollm2',
  ),
]


@functools.cache
def model():
  """(graph, params)."""
  return nnx.split(load(FILE).model)


@functools.cache
def truth():
  with np.load(FOLDER / 'smollm2.npz') as file:
    return dict(file)


def tokens(count):
  return jnp.asarray(truth()['tokens'][:count], jnp.int32)[None]


def test_logits_and_loss_are_those_of_transformers():
  graph, params = model()
  T = 1024
  labels, weights = jnp.roll(tokens(T), -1, 1), jnp.ones((1, T))

  @jax.jit
  def run(params, tokens):
    made = nnx.merge(graph, params)
    sums = made.loss(tokens, labels, weights.at[:, -1].set(0))
    return made(tokens[:, :256]), sums['loss'] / sums['weight']

  logits, loss = run(params, tokens(T))
  found = logits[0, ::8][:, truth()['columns']]
  assert np.abs(found - truth()['logits']).max() < 1e-3
  assert abs(loss - truth()['loss']) < 1e-4


def test_chunks_and_tokens_give_the_logits_of_the_parallel_pass():
  graph, params = model()
  expected = jax.jit(lambda p, t: nnx.merge(graph, p)(t))(params, tokens(160))
  made, found = nnx.merge(graph, params), []
  cache = cache_lib.init(made, batch_size=1, capacity=160)

  @jax.jit
  def extend(params, cache, t):
    return cache_lib.extend(nnx.merge(graph, params), cache, t)

  for begin, end in ((0, 100), (100, 101), (101, 102), (102, 160)):
    logits, cache = extend(params, cache, tokens(160)[:, begin:end])
    found.append(logits)
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), expected, atol=2e-3
  )


def test_eight_devices_give_the_loss_of_one():
  graph, params = model()
  T = 512
  mesh = make_mesh(data=2, seq=4, model=1)
  placement = Placement(mesh, SequenceLayout('zigzag', T, 4), 'ring')
  rows = np.asarray(tokens(1024)).reshape(2, T)
  labels, weights = np.roll(rows, -1, 1), np.ones(rows.shape, np.float32)

  def loss(params, *arrays, placement=None):
    made = nnx.merge(graph, params)
    sums = made.loss(*arrays, placement=placement)
    return sums['loss'] / sums['weight']

  expected = jax.jit(loss)(params, *map(jnp.asarray, (rows, labels, weights)))
  spread = jax.device_put(params, placement.state_shardings(params, fsdp=True))
  arrays = placement.put({'tokens': rows, 'labels': labels, 'weights': weights})
  run = jax.jit(functools.partial(loss, placement=placement))
  actual = run(spread, *arrays.values())
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
