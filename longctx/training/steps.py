"""Training step, evaluation step and initial state, compiled.

A training state is {'params': ..., 'opt': ...}, pure dicts of arrays outside
the model; `graph` is the model without them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from longctx.attention.context import Context
from longctx.models import TransformerConfig, make_model
from longctx.models import abstract_params as abstract_params
from longctx.parallel import Placement
from longctx.training.config import ExperimentConfig
from longctx.training.optimizer import make_optimizer

# Keeps the keys of dropout apart from those of initial parameters.
DROPOUT = 1

State = dict[str, Any]
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
  """Compiled training and evaluation steps.

  Attributes:
    train: (state, batch, step) -> (state, metrics); the old state is donated.
      `step` counts updates from 1 and names the dropout. Metrics are sums over
      the batch, and `grad_norm`.
    evaluate: (params, batch, step) -> sums over the batch; `step` is that of
      the update which made the parameters, None before the first.
  """

  train: Callable[[State, Batch, Any], tuple[State, dict[str, jax.Array]]]
  evaluate: Callable[..., dict[str, jax.Array]]


def init_state(
  model: TransformerConfig,
  config: ExperimentConfig,
  *,
  placement: Placement | None = None,
) -> State:
  """The state before the first update, from `config.seed`.

  Args:
    model: with the vocabulary resolved.
    config: names the seed, the optimizer, and whether the state is split.
    placement: where it lies; None: one device.
  """
  init = _make_init(model, config)
  key = jax.random.key(config.seed)
  shardings = _state_shardings(jax.eval_shape(init, key), config, placement)
  return jax.jit(init, out_shardings=shardings)(key)


def state_of(
  params: Any, config: ExperimentConfig, placement: Placement | None
) -> State:
  """The state before the first update of given parameters."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = {'params': params, 'opt': jax.eval_shape(optimizer.init, params)}
  places = _state_shardings(state, config, placement)
  opt = jax.jit(optimizer.init, out_shardings=places and places['opt'])(params)
  return {'params': params, 'opt': opt}


def abstract_state(
  model: TransformerConfig,
  config: ExperimentConfig,
  *,
  placement: Placement | None = None,
) -> State:
  """`init_state` as ShapeDtypeStructs, whose devices need not be there."""
  params = abstract_params(model)[1]
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = {'params': params, 'opt': jax.eval_shape(optimizer.init, params)}
  if placement is None:
    return state
  shardings = _state_shardings(state, config, placement)
  return jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings)


def _make_init(
  model: TransformerConfig, config: ExperimentConfig
) -> Callable[[jax.Array], State]:
  optimizer = make_optimizer(config.optimizer, config.steps)

  def init(key):
    made = make_model(model, rngs=nnx.Rngs(params=key))
    params = nnx.to_pure_dict(nnx.split(made, nnx.Param)[1])
    return {'params': params, 'opt': optimizer.init(params)}

  return init


def _state_shardings(
  state: State, config: ExperimentConfig, placement: Placement | None
) -> Any:
  if placement is None:
    return None
  return placement.state_shardings(state, fsdp=config.parallel.fsdp)


def make_steps(
  graph: Any,
  config: ExperimentConfig,
  *,
  placement: Placement | None = None,
  byte_counts: np.ndarray | None = None,
) -> CompiledSteps:
  """Makes the compiled functions of a run.

  The loss is sum(nll) / sum(weights) over the whole batch, whatever the number
  of devices and of accumulation steps, so neither changes what is minimised.

  Args:
    graph: of the model.
    config: of the run.
    placement: where batches lie, in its layout's order; None: one device.
    byte_counts: of the task, for `bytes` among the sums; None: no text.
  """
  accumulation = config.optimizer.accumulation

  def sums(params, batch, step, dropout_key=None):
    model = nnx.merge(graph, params)
    context = Context(
      positions=batch.get('positions'),
      segment_ids=batch.get('segment_ids'),
      query_indices=batch.get('query_indices'),
      dropout_key=dropout_key,
      step=step,
      placement=placement,
    )
    arrays = (batch[name] for name in ('tokens', 'labels', 'weights'))
    out = model.loss(*arrays, context, relevant=batch.get('relevant'))
    if byte_counts is not None:
      counts = jnp.asarray(byte_counts)[batch['labels']]
      out |= {'bytes': jnp.where(batch['weights'] > 0, counts, 0).sum()}
    return out['loss'] + out.get('auxiliary', 0.0), out

  def train(state, batch, step):
    params = state['params']
    grad = jax.grad(
      lambda params, batch, key: sums(params, batch, step, key), has_aux=True
    )
    key = None
    if config.model.attention_dropout or config.model.gate.noise:
      key = jax.random.fold_in(jax.random.key(config.seed), DROPOUT)
      key = jax.random.fold_in(key, step)
    if accumulation == 1:
      grads, out = grad(params, batch, key)
    else:
      grads, out = _accumulate(grad, params, batch, key, accumulation)
    return update(state, grads, out, config, placement=placement)

  def evaluate(params, batch, step=None):
    return sums(params, batch, step)[1]

  return CompiledSteps(jax.jit(train, donate_argnums=0), jax.jit(evaluate))


def update(
  state: State,
  grads: Any,
  out: dict[str, jax.Array],
  config: ExperimentConfig,
  *,
  placement: Placement | None = None,
  chosen: Callable[[tuple[Any, ...]], bool] | None = None,
) -> tuple[State, dict[str, jax.Array]]:
  """The state after an update, and the metrics of the step.

  Args:
    state: before it.
    grads: of the sum of a loss.
    out: sums over the batch, of which `weight` divides.
    config: of the run.
    placement: where the state lies; None: one device.
    chosen: whether a parameter, by its path, is updated at all; None: each is.
  """
  params = state['params']
  scale = 1 / jnp.maximum(out['weight'], 1e-9)
  grads = jax.tree.map(
    lambda g, p: (g * scale.astype(g.dtype)).astype(p.dtype), grads, params
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  updates, opt = optimizer.update(grads, state['opt'], params)
  if chosen is not None:
    updates = jax.tree_util.tree_map_with_path(
      lambda path, u: u if chosen(path) else jnp.zeros_like(u), updates
    )
  params = optax.apply_updates(params, updates)
  metrics = {**out, 'grad_norm': optax.tree.norm(grads)}
  state = {'params': params, 'opt': opt}
  if placement is not None:
    shardings = _state_shardings(state, config, placement)
    state = jax.lax.with_sharding_constraint(state, shardings)
  return state, metrics


def _accumulate(grad, params, batch, key, parts):
  """Sums of `grad` over `parts` slices of the batch, one after the other.

  In float32: in bfloat16 a part would be lost from 256 on.
  """
  wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)

  def split(x):
    # Part i takes rows i, i + parts, ...: rows that lie on one device stay
    # there, which contiguous parts of a batch sharded over rows would not.
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  def part_grad(params, part, index):
    part_key = None if key is None else jax.random.fold_in(key, index)
    return grad(params, part, part_key)

  def body(total, part):
    add = lambda x, y: x + y.astype(x.dtype)
    return jax.tree.map(add, total, part_grad(params, *part)), None

  slices = jax.tree.map(split, dict(batch))
  first = jax.tree.map(lambda x: x[0], slices)
  shapes = jax.eval_shape(part_grad, params, first, 0)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s)), shapes)
  return jax.lax.scan(body, zeros, (slices, jnp.arange(parts)))[0]


def with_query_indices(batch: Batch) -> Batch:
  """Adds the places that are scored, where they are few, as `loss` takes them.

  Their number is rounded up to a power of two, so that batches of one task
  share a compilation, and taken where it is at most an eighth of the length.

  Args:
    batch: numpy arrays [B, T], the whole batch.

  Returns:
    The batch, with `query_indices` int32 [B, Q], -1 in rows that score fewer
    places; as it was where most places are scored.
  """
  scored = batch['weights'] > 0
  counts = scored.sum(axis=1)
  Q = 1 << max(int(counts.max()) - 1, 0).bit_length()
  if scored.shape[1] < 8 * Q:
    return batch
  indices = np.full((len(counts), Q), -1, np.int32)
  rows, places = np.nonzero(scored)
  within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
  indices[rows, within] = places
  return {**batch, 'query_indices': indices}


def put(batch: Batch, placement: Placement | None) -> Batch:
  """Moves this process's rows of a batch to the devices.

  Args:
    batch: numpy arrays [rows of this process, T], in natural order.
    placement: where they go; None: to one device.
  """
  if placement is None:
    return jax.device_put(dict(batch))
  return placement.put(batch)
