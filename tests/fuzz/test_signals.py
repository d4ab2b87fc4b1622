"""A sample of the signals that `python -m tests.fuzz.signals` sends."""

import signal

import pytest

from tests.fuzz import signals


@pytest.mark.slow
@pytest.mark.parametrize(
  ('signum', 'index'), [(signal.SIGINT, 1), (signal.SIGKILL, 0)], ids=str
)
def test_both_processes_end_by_a_line_and_resume(signum, index, tmp_path):
  undisturbed = tmp_path / 'undisturbed'
  assert not signals.finish(undisturbed)
  case = signals.Case(signum, index, 'checkpoints/15', 0.2)
  assert signals.run(case, tmp_path / '0', undisturbed) in ('', 'late')
