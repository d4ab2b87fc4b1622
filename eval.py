r"""Measures a trained workdir, as trained or at other values of its task.

python eval.py --workdir=runs/mqar
python eval.py --workdir=runs/mqar --sweep=seq_len=64,128,256 --batches=32

With --mode=s2a it asks questions against opinions
(longctx/evaluation/system2.py):

python eval.py --workdir=runs/s2a --mode=s2a --distractors=0,8,64,256

With --mode=stream it reads an endless stream in constant memory, full attention
exchanged for what each policy keeps (longctx/evaluation/streaming.py):

python eval.py --workdir=runs/bytes_lm --mode=stream --tokens=1000000 \
  --policies=dense,window,recompute,sinks,sinks_text --slots=256 --sinks=4
"""

import pathlib
import sys

from absl import flags

from longctx.cli import flags as cli
from longctx.evaluation import (
  streaming as stream,
)
from longctx.evaluation import (
  sweep as evaluate,
)
from longctx.evaluation import (
  system2 as s2a,
)
from longctx.training.config import ExperimentConfig
from longctx.training.runs import start_devices

_WORKDIR = flags.DEFINE_string('workdir', '', 'folder that train.py wrote')
_SWEEP = flags.DEFINE_string(
  'sweep', '', 'field of the task and its values, as seq_len=64,128,256'
)
_SPLIT = flags.DEFINE_enum(
  'split', 'test', ['train', 'validation', 'test'], 'examples to measure on'
)
_BATCHES = flags.DEFINE_integer(
  'batches', 16, 'batches at each value', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 0, 'rows of a batch; 0: as in validation', lower_bound=0
)
_MODE = flags.DEFINE_enum(
  'mode', 'examples', ['examples', 'stream', 's2a'], 'what is measured'
)
_TOKENS = flags.DEFINE_integer('tokens', 65536, 'of a stream')
_POLICIES = flags.DEFINE_list(
  'policies',
  ['window', 'sinks'],
  'what a stream keeps',
)
_SLOTS = flags.DEFINE_integer('slots', 256, 'keys that a layer keeps')
_SINKS = flags.DEFINE_integer('sinks', 4, 'of them, how many are the first')
_ROWS = flags.DEFINE_integer('rows', 1, 'streams side by side')
_CHUNK = flags.DEFINE_integer(
  'chunk', 128, 'of a stream or a prompt, read at once'
)
_BUCKET = flags.DEFINE_integer('bucket', 16384, 'positions of a line')
_DENSE_TOKENS = flags.DEFINE_integer(
  'dense_tokens', 0, 'end of the dense policy; 0: twice the trained length'
)
_RECOMPUTED = flags.DEFINE_integer(
  'recomputed', 16, 'tokens that the policy recompute scores in a bucket'
)
_RUN = flags.DEFINE_string(
  'run', '', 'of a workdir with several, to stream; for s2a, some by commas'
)
_QUESTIONS = flags.DEFINE_integer('questions', 256, 'of each kind, for s2a')
_CONDITIONS = flags.DEFINE_list(
  'conditions', list(s2a.S2AConfig().conditions), 'of the questions, for s2a'
)
_DISTRACTORS = flags.DEFINE_list(
  'distractors', ['8'], 'facts of other topics, for s2a'
)
_SENTENCES = flags.DEFINE_integer(
  'sentences', 8, 'of a context that mean nothing, for s2a'
)
_MENTIONS = flags.DEFINE_integer('mentions', 1, 'of the fact, for s2a')
_OPINIONS = flags.DEFINE_integer('opinions', 1, 'that are the same, for s2a')
_KEEP = flags.DEFINE_integer(
  'keep', 0, 'spans that may pass a gate, for s2a; 0: as in training'
)
_METHODS = flags.DEFINE_list(
  'methods',
  list(s2a.S2AConfig().methods),
  'how to answer, for s2a',
)


def _devices(config: ExperimentConfig) -> int:
  return config.parallel.devices


def main(argv: list[str]):
  with cli.before_compiling():
    cli.parse_flags(argv)
    if not _WORKDIR.value:
      raise ValueError('--workdir=DIR is missing: a folder that train.py wrote')
    workdir = pathlib.Path(_WORKDIR.value)
    if _MODE.value == 'stream':
      run = evaluate.choose(evaluate.open_workdir(workdir), _RUN.value)
      config = stream.StreamConfig(
        tokens=_TOKENS.value,
        policies=tuple(_POLICIES.value),
        slots=_SLOTS.value,
        sinks=_SINKS.value,
        rows=_ROWS.value,
        chunk=_CHUNK.value,
        bucket=_BUCKET.value,
        dense_tokens=_DENSE_TOKENS.value,
        recomputed=_RECOMPUTED.value,
        split=_SPLIT.value,
      )
      stream.check(run, config)
  if _MODE.value == 'stream':
    with cli.while_running():
      stream.evaluate_stream(run, config)
    return
  if _MODE.value == 's2a':
    with cli.before_compiling():
      runs = evaluate.open_workdir(workdir)
      if _RUN.value:
        runs = [evaluate.choose(runs, n) for n in _RUN.value.split(',')]
      config = s2a.S2AConfig(
        conditions=tuple(_CONDITIONS.value),
        distractors=tuple(int(n) for n in _DISTRACTORS.value),
        count=_QUESTIONS.value,
        sentences=_SENTENCES.value,
        mentions=_MENTIONS.value,
        opinions=_OPINIONS.value,
        keep=_KEEP.value,
        chunk=_CHUNK.value,
        batch_size=_BATCH_SIZE.value or 64,
        methods=tuple(_METHODS.value),
      )
      s2a.check(runs, config)
    with cli.while_running():
      s2a.measure(runs, workdir, config)
    return
  with cli.before_compiling():
    sweep = evaluate.parse_sweep(_SWEEP.value)
    runs = evaluate.open_workdir(workdir)
    start_devices(max((r.config for r in runs), key=_devices))
    for run in runs:
      evaluate.swept_tasks(run, sweep, batch_size=_BATCH_SIZE.value)
  with cli.while_running():
    evaluate.evaluate(
      runs,
      workdir,
      sweep=sweep,
      split=_SPLIT.value,
      batches=_BATCHES.value,
      batch_size=_BATCH_SIZE.value,
    )


if __name__ == '__main__':
  main(sys.argv)
