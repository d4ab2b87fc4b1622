"""Optimizers, learning-rate schedules and weight decay, from one config."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import optax
from optax import contrib

from longctx.attention import VARIANTS
from longctx.typing import (
  Checked,
  Fraction,
  Natural,
  NonNegative,
  Positive,
  PositiveNumber,
  Share,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
  """Optimizer config: how gradients become updates.

  Attributes:
    name: 'adamw', 'muon' (matrices by Muon, all else by AdamW at the same
      learning rate; Jordan 2024, scaled as in arXiv:2502.16982), 'radam'
      (arXiv:1908.03265) or 'sgd' (momentum b1).
    learning_rate: the peak, reached after `warmup_steps`.
    schedule: 'constant', 'cosine' and 'linear' (down to `final_factor` of the
      peak after `schedule_steps`) or 'step' (to `final_factor` at `step_at`).
    schedule_steps: updates after which 'cosine' and 'linear' are down; 0: those
      of the run. A run that goes on for more than it began with needs it.
    warmup_steps: updates in which the learning rate rises to its peak.
    final_factor: share of the peak at the end.
    step_at: update from which 'step' takes that share.
    weight_decay: decoupled, times the learning rate. It applies to weight
      matrices alone: norms, biases and per-head scalars are not shrunk, since
      that changes a scale rather than a capacity, nor are embeddings, whose
      rare rows would fade between their few gradients, nor what a variant
      names in `Attention.undecayed`.
    b1: decay of the first moment, or the momentum.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of a gradient; 0 does not clip.
    accumulation: forward passes that one update is split into.
  """

  prefix: ClassVar[str] = 'optimizer.'

  name: Literal['adamw', 'muon', 'radam', 'sgd'] = 'adamw'
  learning_rate: PositiveNumber = 1e-3
  schedule: Literal['constant', 'cosine', 'linear', 'step'] = 'cosine'
  schedule_steps: Natural = 0
  warmup_steps: Natural = 0
  final_factor: Share = 0.1
  step_at: Natural = 0
  weight_decay: NonNegative = 0.1
  b1: Fraction = 0.9
  b2: Fraction = 0.95
  eps: PositiveNumber = 1e-8
  clip_norm: NonNegative = 1.0
  accumulation: Positive = 1

  def check(self):
    if self.schedule == 'step' and self.step_at <= self.warmup_steps:
      raise ValueError(
        f'optimizer.step_at={self.step_at} must be later than '
        f'optimizer.warmup_steps={self.warmup_steps}'
      )

  def end_of_schedule(self, steps: int) -> int:
    """The update of a run of so many from which its learning rate rests.

    0 where the schedule does not depend on it.
    """
    if self.schedule not in ('cosine', 'linear'):
      return 0
    return self.schedule_steps or steps


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by update: a linear warm-up, then the named shape."""
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(config.end_of_schedule(steps) - warmup, 1)
  if config.schedule == 'cosine':
    body = optax.cosine_decay_schedule(peak, rest, alpha=config.final_factor)
  elif config.schedule == 'linear':
    body = optax.linear_schedule(peak, peak * config.final_factor, rest)
  elif config.schedule == 'step':
    body = optax.piecewise_constant_schedule(
      peak, {config.step_at - warmup: config.final_factor}
    )
  else:
    body = optax.constant_schedule(peak)
  if not warmup:
    return body
  # Starts above zero: an update that changes nothing is a wasted one.
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, body], [warmup])


def _named(path: tuple[Any, ...], *words: str) -> bool:
  name = jax.tree_util.keystr(path).lower()
  return any(word in name for word in words)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
  """Whether a parameter maps vectors to vectors.

  Tables with a row per token or position do not, nor do the taps of a
  depthwise convolution, a vector per channel, nor what a variant says.
  """
  names = {getattr(key, 'key', None) for key in path}
  if names & {x for variant in VARIANTS.values() for x in variant.undecayed}:
    return False
  return leaf.ndim >= 2 and not _named(path, 'embed', 'position', 'conv')


def decay_mask(params: Any) -> Any:
  """True for the weight matrices, which decay; see `OptimizerConfig`."""
  return jax.tree_util.tree_map_with_path(is_matrix, params)


def muon_axes(params: Any) -> Any:
  """Which axes of each parameter Muon reads as rows and columns, or None.

  None, so AdamW, for what is no matrix and for the head, whose rows are
  tokens. A kernel of three axes is [D, heads, dim], or [heads, dim, D] where
  its name says that it leaves the layer.
  """

  def axes(path, leaf):
    if not is_matrix(path, leaf) or _named(path, 'head'):
      return None
    split = leaf.ndim - 1 if _named(path, 'out') else 1
    return contrib.MuonDimensionNumbers(
      tuple(range(split)), tuple(range(split, leaf.ndim))
    )

  return jax.tree_util.tree_map_with_path(axes, params)


def _decayed(rule):
  """A rule for updates, with decoupled weight decay and the learning rate."""
  return lambda config, schedule: optax.chain(
    rule(config),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    optax.scale_by_learning_rate(schedule),
  )


def _muon(config, schedule):
  return contrib.muon(
    schedule,
    weight_decay=config.weight_decay,
    weight_decay_mask=decay_mask,
    adam_b1=config.b1,
    adam_b2=config.b2,
    adam_weight_decay=0.0,
    muon_weight_dimension_numbers=muon_axes,
    # Root mean square of an AdamW update, so that one learning rate fits both.
    consistent_rms=0.2,
  )


def _adam_options(config):
  return {'b1': config.b1, 'b2': config.b2, 'eps': config.eps}


OPTIMIZERS = {
  'adamw': _decayed(lambda c: optax.scale_by_adam(**_adam_options(c))),
  'muon': _muon,
  'radam': _decayed(lambda c: optax.scale_by_radam(**_adam_options(c))),
  'sgd': _decayed(lambda c: optax.trace(decay=c.b1)),
}


def make_optimizer(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
  """Clipping and the named optimizer of a run of so many steps."""
  optimizer = OPTIMIZERS[config.name](config, make_schedule(config, steps))
  if not config.clip_norm:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
