"""Study runner: trains, measures, concludes and draws from a command line.

`studies/__init__.py` says what a study is made of.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longctx.training import log_files
from studies.claims import Claim, conclude, table
from studies.jobs import ROOT, Job, folder_of, run_all

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """A folder of studies/.

  Attributes:
    name: of the folder.
    doc: docstring of run.py, shown by --help.
    jobs: (seed, quick) -> its trainings.
    measure: (job, workdir) -> what is known of a finished one, for JSON; a list
      where it trained several runs, each with its own `run`.
    claims: what is asserted of the rows, by what it says.
    quick: the claims that are to hold with --quick too.
    show: (rows, folder) -> writes pictures and tables.
  """

  name: str
  doc: str
  jobs: Callable[[int, bool], list[Job]]
  measure: Callable[[Job, pathlib.Path], dict[str, Any] | list[dict[str, Any]]]
  claims: Mapping[str, Claim] = dataclasses.field(default_factory=dict)
  quick: Mapping[str, Claim] = dataclasses.field(default_factory=dict)
  show: Callable[[Rows, pathlib.Path], None] | None = None

  def conclude(
    self, rows: Rows, *, command: str, quick: bool = False
  ) -> list[dict[str, Any]]:
    """What results.json holds of these rows."""
    claims = self.quick if quick else {**self.quick, **self.claims}
    return conclude(claims, rows, command=command)

  @property
  def folder(self) -> pathlib.Path:
    return ROOT / 'studies' / self.name


def parse_arguments(study: Study, argv: list[str] | None) -> Any:
  """--seeds, --quick, --processes, --workdir and --out."""
  parser = argparse.ArgumentParser(
    prog=f'python -m studies.{study.name}.run',
    description=study.doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  integers = lambda text: [int(part) for part in text.split(',')]
  parser.add_argument('--seeds', type=integers, help='0,1,2; quick: 0')
  parser.add_argument('--quick', action='store_true', help='reduced size')
  parser.add_argument('--processes', type=int, default=1, help='at a time')
  parser.add_argument('--workdir', type=pathlib.Path, help='of the trainings')
  parser.add_argument('--out', type=pathlib.Path, help='of what was found')
  args = parser.parse_args(argv)
  quick = ROOT / 'runs' / 'quick' / study.name
  args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
  args.workdir = args.workdir or (
    quick if args.quick else ROOT / 'runs' / study.name
  )
  args.out = args.out or (quick if args.quick else study.folder)
  return args


def main(study: Study, argv: list[str] | None = None) -> list[dict[str, Any]]:
  """Runs a study from its command line; returns what results.json holds."""
  args = parse_arguments(study, argv)
  # Seed by seed, so that a study that is stopped early has whole seeds.
  jobs = [job for seed in args.seeds for job in study.jobs(seed, args.quick)]
  run_all(jobs, args.workdir, processes=args.processes, title=study.name)
  rows = [row for job in jobs for row in collect(study, job, args.workdir)]
  command = f'python -m studies.{study.name}.run' + ' --quick' * args.quick
  claims = study.conclude(rows, command=command, quick=args.quick)
  args.out.mkdir(parents=True, exist_ok=True)
  log_files.write_lines(args.out / 'results.jsonl', rows)
  log_files.write_json(args.out / 'results.json', claims)
  if study.show:
    study.show(rows, args.out)
  print(table(claims))
  return claims


def collect(
  study: Study, job: Job, workdir: pathlib.Path
) -> list[dict[str, Any]]:
  """The lines of a finished job in results.jsonl."""
  folder = folder_of(job, workdir)
  done = json.loads((folder / 'done.json').read_text())
  shown = job.commands(f'runs/{study.name}/{folder.name}')
  shared = {
    'command': ' && '.join(f'python {shlex.join(c)}' for c in shown),
    'commit': done['commit'],
    'hardware': done['hardware'],
  }
  found = study.measure(job, folder)
  found = found if isinstance(found, list) else [found]
  return [{'run': job.run, 'seed': job.seed, **one, **shared} for one in found]


def read(workdir: pathlib.Path, name: str = 'results.json') -> Any:
  """What a training or its measurement left behind."""
  return json.loads((workdir / name).read_text())


def by_run(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
  """The rows of all seeds by run, in their order."""
  found = {}
  for row in rows:
    found.setdefault(row['run'], []).append(row)
  return found


def middles(rows: Rows, key: str) -> list[float]:
  """Medians over seeds, place by place, of what each row has a list of."""
  places = zip(*(row[key] for row in rows), strict=True)
  return [statistics.median(values) for values in places]


def write_measured(
  measure: Callable[..., Any],
  doc: str,
  *,
  name: str = 'measured.json',
  **integers: int,
):
  """Runs the command line of a measurement, which writes JSON.

  Args:
    measure: (workdir, integers by name) -> what is written.
    doc: shown by --help.
    name: of the file, in the workdir.
    **integers: further flags and their defaults.
  """
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  for flag, default in integers.items():
    parser.add_argument(f'--{flag}', type=int, default=default)
  args = vars(parser.parse_args())
  log_files.write_json(args['workdir'] / name, measure(**args))
