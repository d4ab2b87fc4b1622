"""Signals to one of two processes: both end, say why in one line, and resume.

    python -m tests.fuzz.signals --times=10

sends each of SIGINT, SIGTERM and SIGKILL to each of two processes that train
together, so many times, at random moments: while they start and compile, in a
step, a validation or a save. A case is wrong where a process lives on for
60 seconds, says more or less than a line, or where the same command does not
end with the parameters and the log of a run that was left alone.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tests.training.test_trainer import ROOT, final_leaves, logged

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)

# Seconds until both have to have ended.
PATIENCE = 60

# What is said while all is well.
PROGRESS = re.compile(
  r'train: (step|new|a step|compiled|already)|no accelerator|^\[Gloo\]'
)
# The only lines to end with.
ENDS = re.compile(
  r'SIG\w+: saved step \d+ of \d+ in .*; the same command continues|'
  r'SIG\w+: interrupted; the same command continues from the last checkpoint|'
  r'error: lost process \d \(.+\) of 2; the same commands, in every process, '
  r'continue from the last checkpoint'
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A signal to one of the processes.

  Attributes:
    index: of the process that gets it.
    after: what has to lie in the workdir before: 'config.json' while it starts.
    delay: seconds from then on.
  """

  signum: signal.Signals
  index: int
  after: str
  delay: float


def draw(rng: random.Random, signum: signal.Signals, index: int) -> Case:
  """A case at a random moment."""
  after = rng.choice(['config.json', 'checkpoints/15'])
  return Case(signum, index, after, rng.uniform(0, 8))


def command(workdir: pathlib.Path, index: int, port: int) -> list[str]:
  return [
    sys.executable,
    str(ROOT / 'train.py'),
    f'--config={ROOT / "configs" / "default.py"}',
    '--config.task.seq_len=16',
    '--config.task.vocab_size=16',
    '--config.task.num_pairs=2',
    "--config.model.layers=('linear',)",
    '--config.model.d_model=16',
    '--config.steps=60',
    '--config.batch_size=4',
    '--config.eval.every=10',
    '--config.checkpoint.every=15',
    '--config.log.every=10',
    '--config.parallel.data=2',
    f'--workdir={workdir}',
    f'--coordinator=localhost:{port}',
    '--num_processes=2',
    f'--process_id={index}',
  ]


# Where a process is that does not end.
STACKS = """import faulthandler, signal
faulthandler.register(signal.SIGUSR1, all_threads=True)
"""


def start(workdir: pathlib.Path) -> list[subprocess.Popen]:
  """Both processes, whose output goes to files beside the workdir."""
  (workdir.parent / 'sitecustomize.py').write_text(STACKS)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  env |= {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': f'{ROOT}:{workdir.parent}',
  }
  running = []
  for index in range(2):
    with output(workdir, index).open('w') as file:
      running.append(
        subprocess.Popen(
          command(workdir, index, port),
          cwd=ROOT,
          env=env,
          stdout=file,
          stderr=subprocess.STDOUT,
        )
      )
  return running


def output(workdir: pathlib.Path, index: int) -> pathlib.Path:
  return workdir.with_name(f'{workdir.name}.{index}.txt')


def wait(running: list[subprocess.Popen], patience: float) -> bool:
  """Whether all have ended in time; they have ended afterwards."""
  end = time.monotonic() + patience
  try:
    for process in running:
      process.wait(max(end - time.monotonic(), 0.1))
    return True
  except subprocess.TimeoutExpired:
    for process in running:
      process.send_signal(signal.SIGUSR1)
    time.sleep(2)
    return False
  finally:
    for process in running:
      process.kill()
      process.wait()


def finish(workdir: pathlib.Path) -> str:
  """Trains to the end: '', or what went wrong."""
  running = start(workdir)
  if not wait(running, 600):
    return 'it does not end'
  codes = [process.returncode for process in running]
  return '' if codes == [0, 0] else f'it ends with {codes}'


def run(case: Case, workdir: pathlib.Path, undisturbed: pathlib.Path) -> str:
  """Tries a case: 'late', '' where all is right, or what is wrong."""
  running = start(workdir)
  while not (workdir / case.after).exists():
    if any(process.poll() is not None for process in running):
      return 'it ended by itself'
    time.sleep(0.02)
  time.sleep(case.delay)
  late = any(process.poll() is not None for process in running)
  running[case.index].send_signal(case.signum)
  begun = time.monotonic()
  in_time = wait(running, PATIENCE)
  seconds = time.monotonic() - begun
  # The last line of a filter may come after its process.
  time.sleep(2)
  codes = [process.returncode for process in running]
  # One that has ended well did so at the end of the run.
  late = late or 0 in codes
  wrong = [] if in_time else [f'not ended within {PATIENCE} s']
  for index in () if late else range(2):
    lines = output(workdir, index).read_text().splitlines()
    said = [line for line in lines if not PROGRESS.search(line)]
    killed = case.signum == signal.SIGKILL and index == case.index
    right = [] if killed else [True]
    if [bool(ENDS.fullmatch(line)) for line in said] != right:
      wrong.append(f'process {index} said {said[:4]}, {len(said)} lines')
  if wrong:
    print(f'WRONG {case}: {"; ".join(wrong)}')
    for index in range(2):
      print(output(workdir, index).read_text())
  if why := finish(workdir):
    wrong.append(f'resumed, {why}')
  elif final_leaves(workdir) != final_leaves(undisturbed):
    wrong.append('resumed, other parameters')
  elif logged(workdir) != logged(undisturbed):
    wrong.append('resumed, another log')
  print(f'{case}: {codes} after {seconds:.0f} s', flush=True)
  return '; '.join(wrong) or ('late' if late else '')


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--times', type=int, default=10)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--at_once', type=int, default=1)
  args = parser.parse_args()
  # In the background it is ignored, here and in what is started.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  rng = random.Random(args.seed)
  cases = [
    draw(rng, signum, index)
    for _ in range(args.times)
    for signum in SIGNALS
    for index in range(2)
  ]
  with tempfile.TemporaryDirectory() as folder:
    undisturbed = pathlib.Path(folder) / 'undisturbed'
    if why := finish(undisturbed):
      sys.exit(f'undisturbed, {why}: {output(undisturbed, 0).read_text()}')
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
      found = list(
        pool.map(
          lambda i: run(cases[i], pathlib.Path(folder) / str(i), undisturbed),
          range(len(cases)),
        )
      )
  for case, what in zip(cases, found, strict=True):
    if what not in ('', 'late'):
      print(f'WRONG {case}: {what}')
  wrong = sum(what not in ('', 'late') for what in found)
  print(
    f'{len(cases)} signals (seed {args.seed}): {wrong} wrong, '
    f'{found.count("late")} after the end'
  )
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
