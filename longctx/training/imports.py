"""Imports of pretrained models: workdirs at step 0."""

import pathlib
from collections.abc import Mapping
from typing import Any

from longctx.models import TransformerConfig, abstract_params
from longctx.pretrained.loading import (
  check_vocabulary,
  find_tensors,
  flatten,
  read_config,
)
from longctx.pretrained.source import open_source
from longctx.tasks import task_defaults
from longctx.training import runs
from longctx.training.config import (
  ExperimentConfig,
  from_config_dict,
  to_dict,
)
from longctx.training.runs import Run


def prepare(
  source: str,
  workdir: pathlib.Path,
  *,
  seq_len: int,
  fields: Mapping[str, Any],
) -> Run:
  """Checks a source and a workdir, before tensors are read.

  Args:
    source: as `pretrained.open_source` takes it.
    workdir: a folder without a run.
    seq_len: tokens of a window, in training and evaluation.
    fields: of the model's config, in place of what the source says.

  Raises:
    ValueError: a source that has no equal here, or lacks a tokenizer; a folder
      that holds a run.
  """
  opened = open_source(source)
  model = vars(read_config(opened))
  model = from_config_dict(
    TransformerConfig, {**to_dict(TransformerConfig(**model)), **fields}
  )
  if (workdir / 'config.json').exists():
    raise ValueError(f'{workdir} holds a run: give another --workdir')
  tokenizer = opened.tokenizer()
  if tokenizer is None:
    raise ValueError(
      f'{opened.name} has no tokenizer.json beside its weights, and text needs '
      'one'
    )
  check_vocabulary(opened, model, tokenizer)
  find_tensors(opened, model, flatten(abstract_params(model)[1]))
  tokenizer.save(workdir / 'tokenizer')
  task = task_defaults(
    'text_lm', seq_len=seq_len, tokenizer=str(workdir / 'tokenizer')
  )
  config = ExperimentConfig(init_from=source, task=task, model=model)
  (run,) = runs.prepare(config, workdir)
  return run
