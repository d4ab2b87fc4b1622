"""Attention transfer: new layers learn the outputs of those they replace.

As in LoLCATs (arXiv:2410.10254), first stage: a model's blocks run with their
own layers, and each exchanged layer is given the same inputs. All others stay
as they are. Then the whole model learns its task.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.analysis import hooks
from longctx.attention.context import Context
from longctx.models import TransformerConfig
from longctx.parallel import Placement
from longctx.training import steps
from longctx.training.config import ExperimentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
  """Teacher of a transfer: the model whose layers were exchanged.

  Attributes:
    graph: of the model.
    params: its parameters.
    exchanged: indices of the layers that are others here.
  """

  graph: Any
  params: Any
  exchanged: tuple[int, ...]


def exchanged_layers(
  old: TransformerConfig, new: TransformerConfig
) -> tuple[int, ...]:
  """Indices of layers that are others in a new model than in the old one.

  Raises:
    ValueError: there are none, or the models have not as many.
  """
  if len(old.layers) != len(new.layers):
    raise ValueError(
      f'transfer.steps exchanges layers one for one: the model of init_from '
      f'has {len(old.layers)}, and this one {len(new.layers)}'
    )
  pairs = zip(old.layers, new.layers, strict=True)
  found = tuple(i for i, (a, b) in enumerate(pairs) if a != b)
  if not found:
    raise ValueError(
      'transfer.steps exchanges layers, and those of init_from are the same: '
      'take transfer.steps=0'
    )
  return found


def make_step(
  graph: Any,
  teacher: Teacher,
  config: ExperimentConfig,
  *,
  placement: Placement | None = None,
) -> Callable[..., tuple[steps.State, dict[str, jax.Array]]]:
  """The compiled update of exchanged layers: (state, teacher, batch, step).

  Its `loss` over its `weight` is the mean over those layers of |ours - theirs|²
  over |theirs|², outputs of the layers at all tokens.
  """

  def loss(params, old, batch, step):
    student, model = nnx.merge(graph, params), nnx.merge(teacher.graph, old)
    context = Context(
      positions=batch.get('positions'),
      segment_ids=batch.get('segment_ids'),
      step=step,
      placement=placement,
    )
    errors = []

    def hook(index, layer, h, x, bound):
      del x
      theirs = layer(h, bound)
      if index in teacher.exchanged:
        real = hooks.is_real(h, bound)[..., None]
        wide = lambda y: jnp.where(real, y.astype(jnp.float32), 0)
        target = jax.lax.stop_gradient(wide(theirs))
        ours = wide(student.blocks[index].attention(h, context))
        size = jnp.maximum(jnp.sum(target**2), 1e-9)
        errors.append(jnp.sum((ours - target) ** 2) / size)
      return theirs

    hooks.run_with_hooks(model, batch['tokens'], hook, context)
    weight = jnp.sum(batch['weights'])
    mean = weight * sum(errors) / len(errors)
    return mean, {'loss': mean, 'weight': weight, 'correct': jnp.zeros(())}

  def is_exchanged(path) -> bool:
    names = [getattr(key, 'key', None) for key in path]
    return names[0] == 'blocks' and (
      names[1] in teacher.exchanged and names[2] == 'attention'
    )

  def step_of(state, old, batch, step):
    grads, out = jax.grad(loss, has_aux=True)(state['params'], old, batch, step)
    return steps.update(
      state, grads, out, config, placement=placement, chosen=is_exchanged
    )

  return jax.jit(step_of, donate_argnums=0)
