"""Jelassi et al., theorem 2.7: what a state of so many bits cannot copy.

A model that decides by one of |S| states copies at most |S| of the V^L strings,
so that it errs on at least 1 - |S| / V^L of them.
"""

import math
from collections.abc import Sequence

BITS_OF_LETTER = math.log2(26)


def least_error(state_bits: float, length: int) -> float:
  """The smallest share of strings of a length that must come out wrong."""
  exponent = state_bits - length * BITS_OF_LETTER
  return 1 - 2.0**exponent if exponent < 0 else 0.0


def effective_bits(lengths: Sequence[int], right: Sequence[float]) -> float:
  """The fewest bits with which the measured shares of strings are possible.

  A share s of V^L strings needs |S| ≥ s V^L: the largest log2 of that over the
  lengths, 0 where no string came out right.
  """
  needed = [
    length * BITS_OF_LETTER + math.log2(share)
    for length, share in zip(lengths, right, strict=True)
    if share > 0
  ]
  return max([0.0, *needed])
