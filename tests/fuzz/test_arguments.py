"""A few of the cases of the campaign of wrong arguments."""

import subprocess
import sys

from longctx.typing import Fraction, Positive, Seed
from tests.fuzz.arguments import ROOT, is_right, targets


def test_wrong_arguments_are_refused_in_a_line_and_right_ones_work():
  # In a process of its own: under pytest jaxtyping would be the first to speak.
  done = subprocess.run(
    [sys.executable, '-m', 'tests.fuzz.arguments', '--count=25', '--seed=7'],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_oracle_knows_right_from_wrong():
  for value, hint, right in (
    (3, Positive, True),
    (0, Positive, False),
    (True, Positive, False),
    (None, Positive | None, True),
    (2.5, Positive | None, False),
    ((1, 2), Positive | tuple[Positive, ...], True),
    (0.99999999, Fraction, False),
    (float('nan'), Fraction, False),
    (10**29, Seed, False),
  ):
    assert is_right(value, hint) == right, (value, hint)


def test_every_kind_of_config_is_drawn():
  found = targets()
  owners = {target.owner for target in found}
  assert {'optimizer.', 'model.gate.', 'mqar', 'nsa', 'favor+'} <= owners
  assert len(found) > 600
