r"""Analysis of the heads of a trained model, as a page to look at.

    python -m longctx.analysis --workdir=runs/induction
    python -m longctx.analysis --workdir=runs/induction --rows=32 --seq_len=128

writes DIR/analysis/report.html, which a browser opens without a server, and
beside it analysis.json with the numbers; with several runs, a page in the
folder of each.
"""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import tasks
from longctx.analysis.analyzer import Analyzer
from longctx.analysis.findings import summary
from longctx.analysis.maps import pooled_maps
from longctx.analysis.report import report
from longctx.attention.context import Context
from longctx.evaluation import sweep
from longctx.evaluation.sweep import Sweep
from longctx.parallel import Placement
from longctx.training import log_files, metrics, runs
from longctx.training.errors import DamagedFileError
from longctx.training.metrics_log import read_metrics
from longctx.training.progress import Progress
from longctx.training.runs import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A run to analyse, and where to write what is found.

  Attributes:
    task: of the run, perhaps at another length.
    placement: of its mesh at that length.
    trained: its parameters.
    page: the HTML file.
    numbers: the JSON file.
  """

  run: Run
  task: tasks.Task
  placement: Placement | None
  trained: sweep.Parameters
  page: pathlib.Path
  numbers: pathlib.Path


def analyse(
  job: Job, progress: Progress, *, rows: int, split: str, command: str
):
  """Measures a run and writes its page and its numbers."""
  graph, params, step, _ = job.trained
  analyzer = Analyzer(
    graph,
    job.run.model,
    job.task,
    rows=rows,
    split=split,
    seed=job.run.config.seed,
    placement=job.placement,
  )
  batch = {key: jnp.asarray(y) for key, y in analyzer.batch.items()}
  draw = jax.jit(
    lambda params: pooled_maps(
      nnx.merge(graph, params),
      batch['tokens'],
      Context(
        segment_ids=batch.get('segment_ids'),
        step=step,
        placement=job.placement,
      ),
    )
  )
  found = []
  for name, measure in (
    ('maps', lambda: jax.device_get(draw(params))),
    ('scores', lambda: analyzer.measure(params, step)),
    ('ablation', lambda: analyzer.ablate(params, step)),
  ):
    with progress.doing(f'{job.run.name} {name}'.strip()):
      found.append(measure())
    progress.advance()
  maps, scores, ablation = found
  folder = job.run.workdir
  numbers = {
    'run': job.run.name,
    'command': command,
    'task': {**job.run.config.task, 'seq_len': job.task.seq_len},
    'step': step,
    'split': split,
    'rows': len(batch['tokens']),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
    'layers': _layers(job.run, nnx.merge(graph, params)),
    'trained_commit': _read(folder / 'versions.json').get('commit'),
    'versions': metrics.versions(),
    'config': dataclasses.asdict(job.run.config),
    'scores': scores,
    'ablation': ablation,
  }
  results = _read(folder / 'results.json')
  text = report(
    numbers,
    [None if y is None else np.asarray(y) for y in maps],
    rows=read_metrics(folder),
    results=results,
  )
  log_files.write_text(job.page, text)
  log_files.write_json(job.numbers, numbers)
  metrics.say(summary(numbers, results.get('phase_change')))
  metrics.say(f'report: {job.page}')


def _layers(run: Run, model: Any) -> list[dict[str, Any]]:
  return [
    {
      'name': name,
      'is_recurrence': block.attention.recurrence is not None,
      'lacks': block.attention.unsupported.get('analysis'),
    }
    for name, block in zip(run.model.layers, model.blocks, strict=True)
  ]


def _read(path: pathlib.Path) -> dict[str, Any]:
  """What a JSON file of the workdir holds; nothing where it is damaged."""
  try:
    return log_files.read_json(path)
  except FileNotFoundError:
    return {}
  except DamagedFileError as error:
    metrics.say(f'{error}: it is left out')
    return {}


def find_jobs(args) -> list[Job]:
  """The runs that flags ask for, checked.

  Raises:
    ValueError, NotImplementedError: flags that cannot work.
    OSError: a folder that cannot be read or written.
    CheckpointError: parameters that cannot be read.
  """
  opened = sweep.open_workdir(args.workdir)
  chosen = [sweep.choose(opened, args.run)] if args.run else opened
  for run in chosen:
    if run.model.gate.keep:
      raise NotImplementedError(
        f'{run.workdir} has a gate, which lets few tokens pass, and analysis '
        'walks through all of them: take a --run without one'
      )
  if args.out and len(chosen) > 1:
    names = ', '.join(run.name for run in chosen)
    raise ValueError(f'--out names one file: choose a --run of {names}')
  if args.out and args.out.suffix != '.html':
    raise ValueError(f'--out={args.out} must end in .html')
  most = max(chosen, key=lambda run: run.config.parallel.devices)
  runs.start_devices(most.config)
  jobs = []
  for run in chosen:
    (task,) = sweep.swept_tasks(run, _length(args.seq_len))
    page = args.out or run.workdir / 'analysis' / 'report.html'
    page.parent.mkdir(parents=True, exist_ok=True)
    # With --out, several pages may lie in a folder.
    numbers = args.out.stem if args.out else 'analysis'
    jobs.append(
      Job(
        run=run,
        task=task,
        placement=runs.make_placement(run.config.parallel, task.seq_len),
        trained=sweep.restore(run, args.step),
        page=page,
        numbers=page.with_name(f'{numbers}.json'),
      )
    )
  return jobs


def prepare(args) -> Callable[[], None]:
  """Checks the flags, opens the runs and reads their parameters."""
  command = shlex.join(['python', '-m', 'longctx.analysis', *args.argv])
  jobs = find_jobs(args)

  def work():
    with Progress('analysis', 3 * len(jobs), unit='part') as progress:
      for job in jobs:
        analyse(
          job, progress, rows=args.rows, split=args.split, command=command
        )

  return work


def _length(seq_len: int | None) -> Sweep:
  if seq_len is None:
    return sweep.parse_sweep('')
  return Sweep(parameter='seq_len', values=(seq_len,))
