"""System 2 Attention, measured: answers where opinions contradict facts.

    python eval.py s2a --workdir=runs/s2a --questions=256 \
      --conditions=none,suggest_wrong --distractors=0,8,64,256

A run with a gate answers by itself, one that learned to rewrite by every method
of `longctx.evaluation.rewrite`, and any other as `baseline`. What is asked is
of the test split, and conditions and numbers of distractors need not be those
of training.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from flax import nnx

from longctx import tasks
from longctx.evaluation import sweep
from longctx.evaluation.rewrite import (
  METHODS,
  Answerer,
  OpinionQuestion,
  capacity,
  questions,
)
from longctx.tasks.opinions import CONDITIONS, UNIT, Opinions
from longctx.training import figures, metrics
from longctx.training.log_files import JsonLog
from longctx.training.progress import Progress
from longctx.training.runs import Run
from longctx.typing import Checked, Natural, Positive, check_some

WITHOUT_GATE = tuple(name for name in METHODS if name != 'gate')

# What tells one line of s2a.jsonl from another.
SETTINGS = ('sentences', 'mentions', 'opinions', 'keep')
FIELDS = ('run', 'condition', 'distractors', *SETTINGS, 'method')
# How often it was asked; another measurement of the same.
ASKED = ('questions', 'batch_size')
# Of a question's row, where it has them.
SHARES = ('precision', 'recall', 'dropped', 'opinion', 'invented')
MEANS = ('read', 'written', 'flops', 'seconds')


@dataclasses.dataclass(frozen=True, kw_only=True)
class S2AConfig(Checked):
  """System 2 Attention evaluation config: questions and methods.

  Attributes:
    conditions: Ask under these conditions of `tasks.opinions`; all of them by
      default.
    distractors: Put this many facts of other topics into a context, each number
      in turn.
    sentences: Put this many sentences that mean nothing into a context.
    mentions: State the fact this often.
    opinions: State the opinion this often.
    questions: Ask this many questions for each condition and number.
    batch_size: Answer this many at a time.
    chunk: Read this many tokens of a prompt at once.
    methods: Answer by these methods of `longctx.evaluation.rewrite`, where a
      run learned to rewrite; by all of them by default.
    keep: Let this many spans pass a gate; 0: as many as in training.
  """

  conditions: tuple[Literal[CONDITIONS[1:]], ...] = CONDITIONS[1:]
  distractors: tuple[Natural, ...] = (8,)
  sentences: Natural = 8
  mentions: Positive = 1
  opinions: Positive = 1
  questions: Positive = 256
  batch_size: Positive = 64
  chunk: Positive = 128
  methods: tuple[Literal[WITHOUT_GATE], ...] = WITHOUT_GATE
  keep: Natural = 0

  def check(self):
    for name in ('conditions', 'distractors', 'methods'):
      check_some(self, name)
    if self.questions > self.batch_size and self.questions % self.batch_size:
      raise ValueError(
        f'questions={self.questions} must be a multiple of batch_size='
        f'{self.batch_size}: another batch would compile, and count as time'
      )


def task_of(
  run: Run, config: S2AConfig, condition: str, distractors: int
) -> Opinions:
  """The task that is asked.

  Raises:
    ValueError: the run was trained on another task, or the number does not fit.
  """
  if not isinstance(run.task, Opinions):
    raise ValueError(
      f'{run.workdir} was trained on {run.config.task["name"]}, and eval.py '
      's2a asks questions of opinions'
    )
  units = distractors + run.task.num_in_topic + config.sentences
  units += config.mentions + config.opinions
  return tasks.make_task(
    **{
      **run.config.task,
      'condition': condition,
      'instruction': 'answer',
      'num_facts': distractors,
      'num_mentions': config.mentions,
      'num_opinions': config.opinions,
      'num_units': units,
      'seq_len': UNIT * units + 6,
    }
  )


def methods_of(run: Run, config: S2AConfig) -> tuple[str, ...]:
  """The methods that a run can answer by."""
  if run.model.gate.keep:
    return ('gate',)
  return config.methods if run.task.rewrite else ('baseline',)


def check(runs: list[Run], config: S2AConfig):
  """Raises ValueError where a run cannot be asked."""
  for run in runs:
    for n in config.distractors:
      task = task_of(run, config, config.conditions[0], n)
      needed = capacity(task, methods_of(run, config))
      learned = run.model.position_encoding == 'learned'
      if learned and needed > run.model.max_positions:
        raise ValueError(
          f'{n} distractors and {config.sentences} sentences take {needed} '
          f'tokens, and {run.workdir} learned {run.model.max_positions} '
          'positions, beyond which there are none: ask with fewer'
        )


def measure(
  runs: list[Run], workdir: pathlib.Path, config: S2AConfig
) -> list[dict[str, Any]]:
  """Asks every run, and writes s2a.jsonl and figures/s2a.png.

  A condition is written when it is measured, and not measured again.

  Returns:
    A line per run, condition, number of distractors and method: accuracy with
    its 95% interval (low, high), tokens `read` and `written`, `flops` and
    `seconds` per answer; `precision` and `recall` of the relevant tokens where
    the context is rewritten or passes a gate; and the shares of rewritten ones
    with errors: `dropped`, `opinion` and `invented`. `recovered` is the share
    of the gap from baseline to oracle, where that is a point at least.
  """
  rows = []
  log = JsonLog(workdir / 's2a.jsonl', keys=FIELDS)
  total = len(runs) * len(config.distractors) * len(config.conditions)
  with Progress('s2a', total, unit='condition') as progress:
    for run in runs:
      for found in _ask(run, config, progress, log):
        rows += found
        for row in found:
          metrics.say(_line(row))
  path = workdir / 'figures' / 's2a.png'
  title = figures.describe(runs[0].config.task, (run.model for run in runs))
  draw(rows, path, title=title)
  metrics.say(f'figure: {path}')
  return rows


def _ask(
  run: Run, config: S2AConfig, progress: Progress, log: JsonLog
) -> Iterator[list[dict[str, Any]]]:
  """The lines of a run, for each condition and number of distractors."""
  if config.keep and run.model.gate.keep:
    gate = dataclasses.replace(run.model.gate, keep=config.keep)
    model = dataclasses.replace(run.model, gate=gate)
    run = dataclasses.replace(run, model=model)
  learned, before = sweep.restore(run), log.rows()
  model = nnx.merge(learned.graph, learned.params)
  methods = methods_of(run, config)
  for n in config.distractors:
    for condition in config.conditions:
      settings = (*SETTINGS, *ASKED)
      heads = [
        {
          'run': run.name,
          'condition': condition,
          'distractors': n,
          **{name: getattr(config, name) for name in settings},
          'method': method,
          **sweep.identity(run, learned),
        }
        for method in methods
      ]
      found = [sweep.find_line(before, head) for head in heads]
      if None in found:
        task = task_of(run, config, condition, n)
        asked = questions(task, seed=run.config.seed, count=config.questions)
        answerer = Answerer(
          model, task, methods=methods, step=learned.step, chunk=config.chunk
        )
        with progress.doing(f'{run.name or "run"} {condition} {n}'):
          measured = [
            summary(answerer, asked, head['method'], config.batch_size)
            for head in heads
          ]
        # All of a condition anew, for its methods are compared.
        log.remove(lambda row, found=found: row in found)
        found = [h | row for h, row in zip(heads, measured, strict=True)]
        add_recovered(found)
        log.append(*found)
      progress.advance()
      yield found


def summary(
  answerer: Answerer, asked: list[OpinionQuestion], method: str, batch_size: int
) -> dict[str, Any]:
  """Means over questions."""
  rows = []
  # Compiles, which is no part of the time.
  answerer.answer(asked[:batch_size], method)
  for begin in range(0, len(asked), batch_size):
    rows += answerer.answer(asked[begin:][:batch_size], method, seed=begin)
  correct = np.array([row['correct'] for row in rows], np.float64)
  low, high = metrics.accuracy_interval(
    correct, np.ones_like(correct), len(correct)
  )
  found = {'accuracy': float(correct.mean()), 'low': low, 'high': high}
  for name in (*MEANS, *SHARES):
    if name in rows[0]:
      found[name] = float(np.mean([row[name] for row in rows]))
  return found


def add_recovered(rows: list[dict[str, Any]]):
  """Adds the share of the gap that each method closes, if there is a gap."""
  accuracy = {row['method']: row['accuracy'] for row in rows}
  if not {'baseline', 'oracle'} <= set(accuracy):
    return
  gap = accuracy['oracle'] - accuracy['baseline']
  for row in rows:
    if gap >= 0.01:
      row['recovered'] = (row['accuracy'] - accuracy['baseline']) / gap


def _line(row: dict[str, Any]) -> str:
  head = ' '.join(
    str(row[k]) for k in ('run', 'condition', 'distractors', 'method')
  )
  more = ''.join(f' {k} {row[k]:.3f}' for k in SHARES if k in row)
  return (
    f'{head} accuracy {row["accuracy"]:.3f} [{row["low"]:.3f}, '
    f'{row["high"]:.3f}]{more} {row["flops"] / 1e6:.1f} MFLOP '
    f'{1e3 * row["seconds"]:.1f} ms'
  )


def draw(rows: list[dict[str, Any]], path: pathlib.Path, *, title: str = ''):
  """Accuracy against distractors, a plot per condition."""
  conditions = list(dict.fromkeys(row['condition'] for row in rows))
  figure, plots = figures.axes(len(conditions), title=title)
  of = lambda row: ': '.join(filter(None, (row['run'], row['method'])))
  styles = figures.styles(map(of, rows))
  for axis, condition in zip(plots, conditions, strict=True):
    axis.set_xscale('symlog', base=2, linthresh=1)
    for name, style in styles.items():
      mine = [r for r in rows if (of(r), r['condition']) == (name, condition)]
      counts = [row['distractors'] for row in mine]
      axis.plot(counts, [r['accuracy'] for r in mine], label=name, **style)
      low, high = ([row[key] for row in mine] for key in ('low', 'high'))
      axis.vlines(counts, low, high, color=style['color'], lw=1)
    axis.set(
      title=f'opinions: {condition.replace("_", " ")}',
      xlabel='distractors',
      ylabel='accuracy',
      ylim=(-0.03, 1.03),
    )
  figures.name_range(plots[0], '95% interval', bars=True)
  figures.legend_below(figure)
  figures.save(figure, path)
