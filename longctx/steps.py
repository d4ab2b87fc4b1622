"""The compiled parts of training: initial state, one update, one measurement.

A training state is {'params': ..., 'opt': ...}, pure dicts of arrays outside
the model; `graph` is the model without them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from longctx.config import ExperimentConfig
from longctx.model import Transformer, TransformerConfig
from longctx.optimizer import make_optimizer

Sharding = jax.sharding.Sharding | None
State = dict[str, Any]
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Steps:
  """Compiled functions.

  Attributes:
    train: (state, batch) -> (state, metrics); the old state is donated.
      Metrics are sums over the batch, and `grad_norm`.
    evaluate: (params, batch) -> sums over the batch.
  """

  train: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Batch], dict[str, jax.Array]]


def abstract_params(config: TransformerConfig) -> tuple[Any, Any]:
  """(graph, params as ShapeDtypeStructs) of a model, without computing it."""
  model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  graph, params = nnx.split(model, nnx.Param)
  return graph, nnx.to_pure_dict(params)


def init_state(
  model: TransformerConfig, config: ExperimentConfig, *, shardings: Any = None
) -> State:
  """The state before the first update, from `config.seed`.

  Args:
    model: with the vocabulary resolved.
    config: names the seed and the optimizer.
    shardings: of the state, a tree or a prefix of one; None: one device.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)

  def init(key):
    transformer = Transformer(model, rngs=nnx.Rngs(params=key))
    params = nnx.to_pure_dict(nnx.split(transformer, nnx.Param)[1])
    return {'params': params, 'opt': optimizer.init(params)}

  key = jax.random.key(config.seed)
  return jax.jit(init, out_shardings=shardings)(key)


def make_steps(graph: Any, config: ExperimentConfig) -> Steps:
  """Makes the compiled functions of a run.

  The loss is sum(nll) / sum(weights) over the whole batch, whatever the number
  of devices and of accumulation steps, so neither changes what is minimised.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  accumulation = config.optimizer.accumulation

  def sums(params, batch):
    model = nnx.merge(graph, params)
    optional = {k: batch.get(k) for k in ('positions', 'segment_ids', 'read')}
    out = model.loss(
      batch['tokens'], batch['labels'], batch['weights'], **optional
    )
    return out['loss'], out

  grad = jax.grad(sums, has_aux=True)

  @functools.partial(jax.jit, donate_argnums=0)
  def train(state, batch):
    params = state['params']
    if accumulation == 1:
      grads, out = grad(params, batch)
    else:
      grads, out = _accumulate(grad, params, batch, accumulation)
    scale = 1 / jnp.maximum(out['weight'], 1e-9)
    grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    updates, opt = optimizer.update(grads, state['opt'], params)
    params = optax.apply_updates(params, updates)
    metrics = {**out, 'grad_norm': optax.tree.norm(grads)}
    return {'params': params, 'opt': opt}, metrics

  evaluate = jax.jit(lambda params, batch: sums(params, batch)[1])
  return Steps(train, evaluate)


def _accumulate(grad, params, batch, parts):
  """Sums of `grad` over `parts` slices of the batch, one after the other."""

  def split(x):
    # Part i takes rows i, i + parts, ...: rows that lie on one device stay
    # there, which contiguous parts of a batch sharded over rows would not.
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  def body(total, part):
    return jax.tree.map(jnp.add, total, grad(params, part)), None

  slices = jax.tree.map(split, dict(batch))
  first = jax.tree.map(lambda x: x[0], slices)
  shapes = jax.eval_shape(grad, params, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(body, zeros, slices)[0]


def with_read(batch: Batch) -> Batch:
  """Adds the places that are scored, where they are few, for `loss` to read.

  Their number is rounded up to a power of two, so that batches of one task
  share a compilation, and taken where it is at most an eighth of the length.

  Args:
    batch: numpy arrays [B, T], the whole batch.

  Returns:
    The batch, with `read` int32 [B, Q], -1 in rows that score fewer places. As
    it was where most places are scored.
  """
  scored = batch['weights'] > 0
  counts = scored.sum(axis=1)
  Q = 1 << max(int(counts.max()) - 1, 0).bit_length()
  if scored.shape[1] < 8 * Q:
    return batch
  read = np.full((len(counts), Q), -1, np.int32)
  rows, places = np.nonzero(scored)
  within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
  read[rows, within] = places
  return {**batch, 'read': read}


def put(batch: Batch, sharding: Sharding) -> Batch:
  """Moves this process's rows of a batch to the devices.

  Args:
    batch: numpy arrays [rows of this process, T].
    sharding: of the whole batch, [B, T]; None puts it on one device.
  """
  if sharding is None:
    return jax.device_put(dict(batch))
  return {
    key: jax.make_array_from_process_local_data(sharding, value)
    for key, value in batch.items()
  }
