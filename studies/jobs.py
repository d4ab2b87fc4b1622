"""Trainings in their own processes, some at a time, resumed by repetition."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from longctx.training import log_files

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One training, and the commands that measure it afterwards.

  Attributes:
    run: its name, which is also a folder's.
    seed: of the parameters and of the order of examples.
    config: 'file.py[:argument]' below the repository.
    overrides: of the config, as {'optimizer.learning_rate': 1e-3}.
    then: command lines without `python`; '{workdir}' stands for its folder.
  """

  run: str
  seed: int
  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  then: tuple[tuple[str, ...], ...] = ()

  def commands(self, workdir: str) -> list[list[str]]:
    """What to run, one after the other, without `python`."""
    train = ['train.py', f'--config={self.config}']
    train += [f'--config.{k}={v}' for k, v in self.overrides.items()]
    train += [f'--config.seed={self.seed}', f'--workdir={workdir}']
    rest = [[w.replace('{workdir}', workdir) for w in c] for c in self.then]
    return [train, *rest]


def folder_of(job: Job, workdir: pathlib.Path) -> pathlib.Path:
  return workdir / f'{job.run}-seed{job.seed}'


def run_all(
  jobs: Iterable[Job],
  workdir: pathlib.Path,
  *,
  processes: int = 1,
  title: str = '',
):
  """Runs what is not finished yet, some at a time, each with its log.txt.

  Raises:
    SystemExit: a command failed; those that ran beside it were stopped, and
      the same call continues.
  """
  jobs = list(jobs)
  waiting = [job for job in jobs if not _finished(job, workdir)]
  running: list[_Running] = []
  # Asked to end, it asks its trainings to.
  before = signal.signal(
    signal.SIGTERM, lambda number, _: sys.exit(128 + number)
  )
  with tqdm(total=len(jobs), initial=len(jobs) - len(waiting)) as bar:
    bar.set_description(title)
    try:
      while waiting or running:
        while waiting and len(running) < processes:
          running.append(_Running(waiting.pop(0), workdir))
          bar.set_postfix_str(' '.join(r.job.run for r in running))
        time.sleep(0.2)
        for one in [r for r in running if r.advance()]:
          running.remove(one)
          bar.update()
    finally:
      signal.signal(signal.SIGTERM, before)
      # train.py saves itself when it is asked to stop.
      for one in running:
        one.stop()


class _Running:
  """A job, of which one command runs at a time."""

  def __init__(self, job: Job, workdir: pathlib.Path):
    self.job = job
    self.folder = folder_of(job, workdir)
    self.folder.mkdir(parents=True, exist_ok=True)
    self.commands = job.commands(str(self.folder))
    self.log = (self.folder / 'log.txt').open('a')
    self.process = self._start()

  def _start(self) -> subprocess.Popen:
    command = [sys.executable, *self.commands.pop(0)]
    # The seeds of a run share their programs.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(self.folder.parent / 'compiled')}
    return subprocess.Popen(
      command,
      cwd=ROOT,
      stdout=self.log,
      stderr=subprocess.STDOUT,
      env=cache | os.environ | {'PYTHONPATH': str(ROOT)},
    )

  def advance(self) -> bool:
    """Whether all of it has ended."""
    code = self.process.poll()
    if code is None:
      return False
    if code:
      raise SystemExit(
        f'{shlex.join(self.process.args[1:])} ended with {code}: '
        f'{self.log.name}'
      )
    if self.commands:
      self.process = self._start()
      return False
    self.log.close()
    done = {'commands': self.job.commands(str(self.folder))}
    done |= _provenance(self.folder)
    log_files.write_json(self.folder / 'done.json', done)
    return True

  def stop(self):
    self.process.terminate()
    self.process.wait()
    self.log.close()


def _finished(job: Job, workdir: pathlib.Path) -> bool:
  folder = folder_of(job, workdir)
  path = folder / 'done.json'
  commands = job.commands(str(folder))
  return path.exists() and json.loads(path.read_text())['commands'] == commands


def _provenance(workdir: pathlib.Path) -> dict[str, str]:
  """The commit and the machine that a workdir was trained at."""
  found = json.loads((workdir / 'versions.json').read_text())
  commit = found['commit'] or 'unknown'
  edited = '+' * commit.endswith('+')
  device = found['device']
  if found['platform'] == 'cpu':
    device = f'{found["cpus"]} CPU cores ({_cpu()})'
  return {
    'commit': commit[:7] + edited,
    'hardware': f'{device}, jax {found["jax"]}',
  }


def _cpu() -> str:
  """The processor's name, as far as the system tells."""
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [x.partition(':')[2].strip() for x in lines if x[:10] == 'model name']
  return names[0] if names else 'unknown'
