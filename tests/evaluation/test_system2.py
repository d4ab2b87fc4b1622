"""System 2 Attention, measured: refused before it is read, or never twice."""

import dataclasses
import pathlib

import pytest

from longctx import tasks
from longctx.evaluation import sweep, system2
from longctx.evaluation.rewrite import METHODS, capacity
from longctx.evaluation.system2 import S2AConfig
from longctx.models import TransformerConfig
from longctx.training import log_files, runs, trainer
from longctx.training.config import ExperimentConfig
from longctx.training.runs import Run
from tests.tiny import tiny_config


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'conditions': ()}, r'conditions=\(\) must have entries'),
    ({'methods': ()}, r'methods=\(\) must have entries'),
    ({'distractors': ()}, r'distractors=\(\) must have entries'),
    ({'methods': ('s2a', 's2a')}, 'each of them once'),
    ({'conditions': ('',)}, r"unknown conditions.0.=''; known: none"),
    ({'distractors': (8, -1)}, 'distractors.1.=-1 must be at least 0'),
  ],
)
def test_empty_or_wrong_lists_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    S2AConfig(**fields)


def run(positions: int, **fields) -> Run:
  config = tasks.task_defaults('opinions', **fields)
  model = TransformerConfig(
    position_encoding='learned', max_positions=positions
  )
  return Run(
    name='',
    config=ExperimentConfig(task=config, model=model),
    task=tasks.make_task(**config),
    model=model,
    workdir=pathlib.Path('runs/s2a'),
  )


def test_more_tokens_than_learned_positions_are_refused():
  config = S2AConfig(distractors=(0, 200))
  with pytest.raises(ValueError, match=r'200 distractors and 8 .* 128 posi'):
    system2.check([run(128)], config)
  # Without rewriting there is no room for what is written.
  baseline = run(128, rewrite=0.0)
  assert system2.methods_of(baseline, config) == ('baseline',)
  system2.check([baseline], S2AConfig(distractors=(8,)))


def test_capacity_holds_what_the_methods_write():
  task = tasks.make_task('opinions', num_units=20)
  assert capacity(task, ('baseline',)) == 4 * 20 + 7
  assert capacity(task, tuple(METHODS)) == 4 * 20 + 6 + 2 * 16


CONFIG = system2.S2AConfig(
  conditions=('none', 'suggest_wrong'), distractors=(2,), questions=4
)


class StoppedHere(Exception):
  pass


def test_a_condition_is_written_when_it_is_measured_and_not_measured_again(
  tmp_path, monkeypatch
):
  config = dataclasses.replace(
    tiny_config(steps=1), task=tasks.task_defaults('opinions', rewrite=0.0)
  )
  trainer.train(runs.prepare(config, tmp_path), tmp_path)
  opened = sweep.open_workdir(tmp_path)
  summary, asked = system2.summary, []

  def counted(answerer, *rest):
    asked.append(answerer)
    if len(asked) == 2:
      raise StoppedHere
    return summary(answerer, *rest)

  monkeypatch.setattr(system2, 'summary', counted)
  with pytest.raises(StoppedHere):
    system2.measure(opened, tmp_path, CONFIG)
  (before,) = log_files.read_lines(tmp_path / 's2a.jsonl')
  rows = system2.measure(opened, tmp_path, CONFIG)
  assert [row['condition'] for row in rows] == list(CONFIG.conditions)
  assert (rows[0], len(asked)) == (before, 3)
  assert log_files.read_lines(tmp_path / 's2a.jsonl') == rows
  assert system2.measure(opened, tmp_path, CONFIG) == rows
  assert len(asked) == 3
