"""RoPE scaling: frequencies for contexts longer than a model was trained on.

    'linear(factor=8.0)'
    'yarn(factor=4.0, original_context=32768)'
    'llama3(factor=8.0, original_context=8192)'

Each method is a frozen dataclass that makes, of RoPE's frequencies, others and
an amplitude that rotated queries and keys are multiplied by.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable
from typing import Annotated

import numpy as np

from longctx.typing import (
  Between,
  Checked,
  Positive,
  PositiveNumber,
  among,
  make,
  parse_call,
)

Factor = Annotated[float, Between(1, 1e6)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked):
  """RoPE scaling, of which this is none: the frequencies as they are."""

  @property
  def amplitude(self) -> float:
    """What rotated queries and keys are multiplied by."""
    return 1.0

  def scale(self, radians: np.ndarray, base: float) -> np.ndarray:
    """Frequencies in place of base^(-2i/R), radians per position, [R/2]."""
    del base
    return radians


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(RopeScaling):
  """Position interpolation (arXiv:2306.15595): positions over `factor`."""

  factor: Factor

  def scale(self, radians: np.ndarray, base: float) -> np.ndarray:
    return radians / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTK(RopeScaling):
  """NTK-aware scaling: the base times factor^(R / (R - 2)).

  The lowest frequency is then that of `Linear` and the highest is as it was
  (bloc97, 2023, as cited by YaRN, arXiv:2309.00071, section 3.1).
  """

  factor: Factor

  def scale(self, radians: np.ndarray, base: float) -> np.ndarray:
    R = 2 * len(radians)
    base = base * self.factor ** (R / max(R - 2, 1))
    return base ** (-np.arange(0, R, 2) / R)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
  """YaRN (arXiv:2309.00071): low frequencies are interpolated, high ones stay.

  Attributes:
    factor: of the context.
    original_context: tokens that the model was trained on.
    beta_fast: turns within the original context from which on a frequency
      stays.
    beta_slow: turns up to which one is interpolated.
    attention_factor: the amplitude; None takes 0.1 log(factor) + 1.
    truncate: whether the bounds between them are whole pairs.
  """

  factor: Factor
  original_context: Positive
  beta_fast: PositiveNumber = 32.0
  beta_slow: PositiveNumber = 1.0
  attention_factor: PositiveNumber | None = None
  truncate: bool = True

  @property
  def amplitude(self) -> float:
    return self.attention_factor or 0.1 * math.log(self.factor) + 1

  def scale(self, radians: np.ndarray, base: float) -> np.ndarray:
    R = 2 * len(radians)

    if base == 1:
      raise ValueError('yarn needs frequencies that differ: a base above 1')

    def pair(turns: float) -> float:
      length = self.original_context / (turns * 2 * math.pi)
      return R * math.log(length) / (2 * math.log(base))

    low, high = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    width = high - low or 0.001
    share = np.clip((np.arange(R // 2) - low) / width, 0, 1)
    return share * radians / self.factor + (1 - share) * radians


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(RopeScaling):
  """Llama 3.1 (arXiv:2407.21783): long wavelengths are interpolated.

  Attributes:
    factor: of the context.
    original_context: tokens that the model was trained on.
    low_freq_factor: turns within the original context up to which a frequency
      is interpolated.
    high_freq_factor: turns from which on one stays.
  """

  factor: Factor
  original_context: Positive
  low_freq_factor: PositiveNumber = 1.0
  high_freq_factor: PositiveNumber = 4.0

  def check(self):
    if not self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        f'low_freq_factor={self.low_freq_factor} must be below '
        f'high_freq_factor={self.high_freq_factor}'
      )

  def scale(self, radians: np.ndarray, base: float) -> np.ndarray:
    turns = self.original_context * radians / (2 * math.pi)
    low, high = self.low_freq_factor, self.high_freq_factor
    stays = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - stays) * radians / self.factor + stays * radians


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(RopeScaling):
  """LongRoPE (arXiv:2402.13753): a searched factor for each frequency.

  Which factors hold is told by `context`, and not by the length of what is
  read: keys that were rotated by one set are never read by another.

  Attributes:
    short_factor: one per pair, up to the original context.
    long_factor: one per pair, beyond it.
    original_context: tokens that the model was trained on.
    context: tokens that it is used on at most.
    attention_factor: the amplitude; None takes
      √(1 + log(context / original_context) / log(original_context)).
  """

  short_factor: tuple[PositiveNumber, ...]
  long_factor: tuple[PositiveNumber, ...]
  original_context: Annotated[int, Between(2)]
  context: Positive
  attention_factor: PositiveNumber | None = None

  @property
  def amplitude(self) -> float:
    if self.attention_factor:
      return self.attention_factor
    factor = self.context / self.original_context
    if factor <= 1:
      return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(self.original_context))

  def scale(self, radians: np.ndarray, base: float) -> np.ndarray:
    is_long = self.context > self.original_context
    factors = self.long_factor if is_long else self.short_factor
    if len(factors) != len(radians):
      raise ValueError(
        f'longrope has {len(factors)} factors, and {2 * len(radians)} rotated '
        f'channels need {len(radians)}'
      )
    return radians / np.array(factors)


SCALINGS: dict[str, Callable[..., RopeScaling]] = {
  'none': RopeScaling,
  'linear': Linear,
  'ntk': NTK,
  'yarn': Yarn,
  'llama3': Llama3,
  'longrope': LongRope,
}


def parse_scaling(text: str) -> RopeScaling:
  """The scaling that a text names, such as 'linear(factor=8.0)'.

  Raises:
    ValueError: an unknown name, or arguments that do not fit.
  """
  try:
    name, arguments = parse_call(text)
  except ValueError as error:
    raise ValueError(
      f"cannot read {reprlib.repr(text)}: write 'none', or as in "
      "'linear(factor=8.0)'"
    ) from error
  if name not in SCALINGS:
    raise ValueError(f'unknown scaling {name!r}{among(name, SCALINGS)}')
  return make(SCALINGS[name], name, arguments)
