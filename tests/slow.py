"""The slow tail of the tests: what `make test` leaves to `make test-all`.

One table, by patterns of test ids, so that it can follow a measurement
(`pytest --durations=0`). What is here costs most and breaks least alone: rows
of a table of which cheaper rows, or rows of one more option each, stay. The
conformance suite marks its own cells.
"""

import fnmatch

# Files that take longest, in that order. A worker takes a file at a time, so a
# long one that comes last leaves the others idle.
FIRST = (
  'tests/attention/test_conformance.py',
  'tests/training/test_parallel_training.py',
  'tests/training/test_trainer.py',
  'tests/test_configs.py',
  'tests/ops/test_dot_product_attention.py',
  'tests/ops/recurrence/test_recurrence.py',
  'tests/parallel/test_schemes.py',
  'tests/models/test_transformer.py',
  'tests/ops/test_block_selection.py',
  'tests/costs/test_attention.py',
)

# Of a pattern's tests, those that match one of its exceptions stay.
SLOW = {
  'tests/analysis/test_analyzer.py::test_a_mesh_measures_the_same*': (),
  'tests/attention/test_leaks.py::*pallas*': (),
  'tests/attention/test_leaks.py::*-alone]': (),
  'tests/attention/test_linear_family.py::*-f64-reference*': (),
  'tests/attention/test_softmax_family.py::*-reference]': (),
  'tests/attention/test_leaks.py::test_no_feature_map*': ('*[[]elu*',),
  'tests/attention/test_linear_family.py::test_layer_equals*f64*': (),
  'tests/attention/test_leaks.py::test_outputs_read*': ('*-rope-*',),
  'tests/attention/test_softmax_family.py::test_forgetting_keeps*': (),
  'tests/attention/test_softmax_family.py::test_longformer_heads*': (),
  'tests/attention/test_segments.py::test_cumulative_sum*': (
    '*zigzag-packed*',
  ),
  'tests/costs/test_attention.py::test_a_window_sends*': ('*False*',),
  'tests/costs/test_attention.py::test_bytes_of_a_scheme*': (
    '*[[]ring-axes0*',
    '*[[]ulysses-*',
  ),
  'tests/costs/test_attention.py::test_executed_blocks*': (
    '*contiguous-causal*',
  ),
  'tests/costs/test_attention.py::test_bytes_of_a_ring_are_those*': (
    '*-striped*',
    '*[[]longformer-zigzag*',
  ),
  'tests/decoding/test_cache.py::test_any_pieces*': ('*[[]mixed-rope*',),
  'tests/decoding/test_cache.py::test_endless_streams*': (),
  'tests/decoding/test_cache.py::test_rows_of_different*': (),
  'tests/decoding/test_cache.py::test_eight_devices*': ('*[[][]]',),
  'tests/decoding/test_cache.py::test_sinks_and_window_stream_for*': (),
  'tests/decoding/test_sampler.py::test_a_mesh_draws*': ('*[[]seq]',),
  'tests/decoding/test_sampler.py::test_greedy_tokens*': ('*[[]3]',),
  'tests/docs/test_notebooks.py::*ring*': (),
  'tests/docs/test_pages.py::test_python_block*library*': ('*-0]',),
  'tests/evaluation/test_streaming.py::test_a_stream_goes_on*': (),
  'tests/evaluation/test_streaming.py::test_a_stream_of_bfloat16*': (),
  'tests/evaluation/test_streaming.py::test_a_stream_whose*': ('*[[]cut]',),
  'tests/evaluation/test_streaming.py::test_other_tasks*': (),
  'tests/evaluation/test_streaming.py::test_buckets*': ('*[[]sinks]',),
  'tests/models/test_block.py::test_mesh_gives*': ('*[[]both]',),
  'tests/models/test_block.py::test_chunks_and*': ('*[[]both]',),
  'tests/models/test_gate.py::test_a_gate_on_a_mesh*': (),
  'tests/models/test_gate.py::test_a_trained_gate_logs*': (),
  'tests/models/test_gate.py::test_decoding_continues*': ('*deltanet-4*',),
  'tests/models/test_matching.py::test_width_is*': ('*full*',),
  'tests/models/test_transformer.py::test_reading_at_places*': (
    '*full-rope-packed*',
    '*linear-*',
  ),
  'tests/models/test_transformer.py::test_packed_documents*': ('*rope*',),
  'tests/models/test_transformer.py::test_remat_changes*': ('*[[]dots]',),
  'tests/pretrained/test_families.py::test_logits*': (
    '*[[]llama-tied]',
    '*[[]gemma3]',
    '*[[]phi3]',
  ),
  'tests/pretrained/test_families.py::test_cached*': ('*[[]gemma3]',),
  'tests/pretrained/test_families.py::test_gradients*': ('*[[]llama-tied]',),
  'tests/test_configs.py::*smollm2:*': (),
  'tests/training/test_warm_start.py::*bit_for_bit*': ('*[[]0]',),
  'tests/ops/recurrence/test_recurrence.py::*pallas*': (
    '*[[]linear-T150-*',
    '*[[]delta-T70-*',
  ),
  'tests/ops/recurrence/test_recurrence.py::test_second_derivative*': (
    '*delta-reverse-xla*',
  ),
  'tests/ops/test_attention_kernels.py::test_equals_reference_for_*': (
    '*everything*',
  ),
  'tests/ops/test_block_selection.py::test_blockwise_equals*': ('*packed*',),
  'tests/ops/test_block_selection.py::test_second_derivative*': (
    '*reverse-nsa*',
  ),
  'tests/ops/test_block_selection.py::test_memory_is_linear*': (
    '*packed-nsa*',
  ),
  'tests/ops/test_dot_product_attention.py::test_second_derivative*': (
    '*masked-rows-reverse*',
  ),
  'tests/ops/test_tpu_compiler.py::*': ('*every_chip[[]v5p*',),
  'tests/parallel/test_gathered_kv.py::test_many_devices*': (
    '*nsa-seq4-model2-contiguous*',
  ),
  'tests/parallel/test_kernels_on_mesh.py::*': (),
  'tests/parallel/test_recurrences.py::test_kernels_of_shards*': (),
  'tests/parallel/test_recurrences.py::test_shards_equal*': (
    '*delta-data2*',
    '*linear-seq*zigzag*',
  ),
  'tests/parallel/test_schemes.py::test_arrays_in_the_layout*': ('*zigzag*',),
  'tests/parallel/test_schemes.py::test_block_sizes_change*': ('*longformer*',),
  'tests/parallel/test_schemes.py::test_every_scheme_is_exact*': (
    '*longformer-gqa*',
    '*packed-gqa*',
  ),
  'tests/parallel/test_schemes.py::test_every_layout_is_exact*': (
    '*packed-contiguous*',
  ),
  'tests/parallel/test_schemes.py::test_every_option_is_exact*': (
    '*[[]ring-everything*',
  ),
  'tests/parallel/test_schemes.py::test_every_mesh_is_exact*': (
    '*[[]ring-everything*',
  ),
  'tests/parallel/test_schemes.py::test_jit_changes_nothing*': (),
  'tests/parallel/test_schemes.py::test_second_derivative*': (),
  'tests/parallel/test_schemes.py::test_fewer_tokens*': ('*ring-1-*',),
  'tests/plan/test_wire_bytes.py::*': (),
  'tests/evaluation/test_system2.py::test_a_condition*': (),
  'tests/training/test_full_disk.py::test_a_disk_that_fills*': (),
  'tests/training/test_resumption.py::test_what_may_change_moves*': (
    '*change0*',
    '*change1*',
    '*change4*',
  ),
  'tests/evaluation/test_rewrite.py::test_answers_are_those*': ('*[[]gate0]',),
  'tests/evaluation/test_streaming.py::test_a_stream_whose_files*': (
    '*[[]cut]',
  ),
  'tests/test_benchmarks.py::test_analysis_is_timed*': (),
  'tests/test_benchmarks.py::test_ring_is_timed*': (),
  'tests/test_configs.py::*[[]passkey_1m]': (),
  'tests/test_configs.py::*[[]s2a]': (),
  'tests/training/test_full_disk.py::*': ('*JsonLog*',),
  'tests/training/test_parallel_training.py::test_several_processes*': (),
  'tests/training/test_parallel_training.py::*with_dropout*fsdp*': (),
  'tests/training/test_parallel_training.py::test_recurrent_layers*': (),
  'tests/training/test_trainer.py::test_bend_makes*': (),
  'tests/training/test_trainer.py::test_sigkill*': (),
}


def order_of(test: str) -> int:
  """The place of a test's file among all files, by its id."""
  file = test.partition('::')[0]
  return FIRST.index(file) if file in FIRST else len(FIRST)


def pattern_of(test: str) -> str | None:
  """The pattern that makes a test slow, by its id."""
  for pattern, exceptions in SLOW.items():
    if fnmatch.fnmatchcase(test, pattern) and not any(
      fnmatch.fnmatchcase(test, stays) for stays in exceptions
    ):
      return pattern
  return None
