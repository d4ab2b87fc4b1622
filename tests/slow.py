"""The slow tail of the tests: what `make test` leaves to `make test-all`.

One table, by patterns of test ids, so that it can follow a measurement
(`pytest --durations=0`). What is here costs most and breaks least alone: rows
of a table of which cheaper rows, or rows of one more option each, stay. The
conformance suite marks its own cells.
"""

import fnmatch

# Of a pattern's tests, those that match one of its exceptions stay.
SLOW = {
  'tests/ops/test_attention_kernels.py::test_equals_reference_for_*': (
    '*everything*',
  ),
  'tests/ops/test_tpu_compiler.py::*': ('*every_chip[[]v5p*',),
  'tests/ops/recurrence/test_recurrence.py::*pallas*': (
    '*[[]linear-T150-*',
    '*[[]delta-T70-*',
  ),
  'tests/attention/test_leaks.py::*pallas*': (),
  'tests/attention/test_linear_family.py::*-f64-reference*': (),
  'tests/costs/test_attention.py::test_bytes_of_a_ring_are_those*': (
    '*-striped*',
    '*[[]longformer-zigzag*',
  ),
  'tests/parallel/test_kernels_on_mesh.py::*': (),
  'tests/parallel/test_schemes.py::test_every_scheme_is_exact*mha*': (),
  'tests/parallel/test_schemes.py::test_every_layout_is_exact*': ('*packed*',),
  'tests/parallel/test_schemes.py::test_every_mesh_is_exact*': (
    '*[[]ring-everything*',
  ),
  'tests/plan/test_wire_bytes.py::*': (),
}


def pattern_of(test: str) -> str | None:
  """The pattern that makes a test slow, by its id."""
  for pattern, exceptions in SLOW.items():
    if fnmatch.fnmatchcase(test, pattern) and not any(
      fnmatch.fnmatchcase(test, stays) for stays in exceptions
    ):
      return pattern
  return None
