"""Damage to the files of a workdir: recovered, or named in one line.

    python -m tests.fuzz.damage --cases=500

Takes a workdir that was left by a command, damages one of its files (flipped
bits, a cut, an overwritten piece, garbage lines, nothing left of it) and gives
the command again. Each case must end

  - with the parameters, lines and results of a workdir that nothing befell, or
    with some of its lines missing and the damaged file named; or
  - refused, in one line that names the file,

never with a traceback, with other numbers, or with good lines gone. Prints what
came out of how many, and the seed of each case that went wrong;
`--cases=1 --seed=N` makes it again.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import io
import json
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from longctx.cli import flags
from longctx.training import log_files, signals, steps

ROOT = pathlib.Path(__file__).parents[2]

# Those of measured time, and what a disk or a process is asked for.
TIMES = ('tokens_per_second', 'seconds', 'peak_memory', 'analysis_share')
LOGS = ('metrics.jsonl', 'eval.jsonl', 'stream.jsonl')
# What no command reads.
OUTPUTS = ('figures', 'lock')

MODEL = (
  "--config.model.layers=('full',)",
  '--config.model.d_model=16',
  '--config.model.num_heads=2',
)
SIZES = (
  '--config.steps=12',
  '--config.batch_size=4',
  '--config.eval.every=4',
  '--config.eval.batches=1',
  '--config.eval.test_batches=1',
  '--config.checkpoint.every=5',
  '--config.log.every=2',
)
MQAR = (
  '--config.task.seq_len=16',
  '--config.task.vocab_size=16',
  '--config.task.num_pairs=2',
)


def train(folder: pathlib.Path, *more: str) -> tuple[str, list[str]]:
  argv = [f'--config={ROOT}/configs/default.py', *MQAR, *MODEL, *SIZES, *more]
  return 'train', [*argv, f'--workdir={folder}/run']


def prepared(folder: pathlib.Path) -> tuple[str, list[str]]:
  return train(folder, f'--config.data.directory={folder}/data')


def named(folder: pathlib.Path) -> tuple[str, list[str]]:
  name, argv = train(folder)
  text = (
    'from configs import default\n'
    'def get_config():\n'
    "  config = default.get_config('mqar')\n"
    "  config.runs = {n: {'seed': i} for i, n in enumerate('ab')}\n"
    '  return config\n'
  )
  path = folder.parent / 'named.py'
  path.write_text(text)
  return name, [f'--config={path}', *argv[1:]]


def text(folder: pathlib.Path) -> tuple[str, list[str]]:
  path = folder.parent / 'text.txt'
  if not path.exists():
    words = np.random.default_rng(0).choice([b'one ', b'two ', b'six. '], 3000)
    path.write_bytes(b''.join(words))
  argv = [f'--config={ROOT}/configs/default.py:bytes_lm', *MODEL, *SIZES]
  argv += [f'--config.task.path={path}', '--config.task.seq_len=16']
  return 'train', [*argv, f'--workdir={folder}/run']


def sweep(folder: pathlib.Path, values: str = '1,2,3'):
  argv = [f'--workdir={folder}/run', f'--task.num_pairs={values}']
  return 'eval sweep', [*argv, '--batches=1']


def stream(folder: pathlib.Path, tokens: int = 48):
  argv = ['--policies=sinks', '--slots=6', '--sinks=2', '--chunk=8']
  argv += ['--bucket=16', f'--tokens={tokens}']
  return 'eval stream', [f'--workdir={folder}/run', *argv]


def prepare(folder: pathlib.Path):
  argv = ['prepare', f'--data_dir={folder}/data', *prepared(folder)[1][:-2]]
  return 'data', argv


def stopped(command, folder):
  """Gives a command that is stopped after step 7."""

  def due(self):
    self._calls += 1
    self.signum = 15 if self._calls >= 7 else None
    return self._calls >= 7

  whole, signals.StopRequest.due = signals.StopRequest.due, due
  try:
    run(*command(folder))
  finally:
    signals.StopRequest.due = whole


@dataclasses.dataclass(frozen=True)
class Scenario:
  """A workdir that a command left, and the command that is given again.

  Attributes:
    make: leaves it.
    again: gives the command.
    weight: how often it is drawn.
    writes: what the command writes; '' for all.
  """

  make: Callable[[pathlib.Path], object]
  again: Callable[[pathlib.Path], tuple[str, list[str]]]
  weight: int
  writes: str = ''


SCENARIOS = {
  'finished': Scenario(lambda f: run(*train(f)), train, 4),
  'stopped': Scenario(lambda f: stopped(train, f), train, 6),
  'named': Scenario(lambda f: run(*named(f)), named, 1),
  'swept': Scenario(
    lambda f: (run(*train(f)), run(*sweep(f, '1,2'))), sweep, 3, 'eval.jsonl'
  ),
  'streamed': Scenario(
    lambda f: (run(*text(f)), run(*stream(f, 32))), stream, 3, 'stream.jsonl'
  ),
  'prepared': Scenario(
    lambda f: (run(*prepare(f)), stopped(prepared, f)), prepared, 3
  ),
}


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a command ended: its exit code, or a traceback, and what it said."""

  code: int | str
  said: str


def run(name: str, argv: list[str]) -> Ended:
  """Gives a command in this process."""
  said, code = io.StringIO(), 0
  log_files._say_once.cache_clear()
  with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    try:
      flags.run(name, argv)
    except SystemExit as error:
      code = error.code
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt):
        raise
      code = f'{type(error).__name__}: {error}'
  return Ended(code, said.getvalue())


def outcome(folder: pathlib.Path) -> dict[str, object]:
  """Parameters, lines and results of all runs, without times."""
  found = {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if path.name in LOGS:
      rows = log_files.JsonLog(path).lines()
      rows = [strip(line.row) for line in rows if line.row is not None]
      found[name] = sorted(json.dumps(row, sort_keys=True) for row in rows)
    elif path.name == 'results.json':
      with contextlib.suppress(ValueError):
        found[name] = strip(json.loads(path.read_text(errors='replace')))
    elif path.name == 'checkpoints' and 'damaged' not in name:
      last = max(path.glob('[0-9]*'), key=lambda p: int(p.name), default=None)
      with contextlib.suppress(OSError, ValueError):
        record = json.loads((last / 'meta' / 'metadata').read_text())
        found[name] = [last.name, record['leaves']]
  return found


def strip(value):
  if isinstance(value, dict):
    return {k: strip(v) for k, v in value.items() if k not in TIMES}
  return value


def damage(path: pathlib.Path, rng: np.random.Generator) -> str:
  """Damages a file in some way, whose name is returned."""
  content = bytearray(path.read_bytes())
  kinds = ['flip', 'flips', 'cut', 'overwritten', 'empty', 'missing']
  if path.suffix in ('.jsonl', '.json') or path.name == log_files.SUMS:
    kinds += ['garbage line', 'blank line', 'line gone']
  kind = str(rng.choice(kinds))
  size = len(content)
  if kind == 'missing':
    path.unlink()
    return kind
  if kind == 'empty' or not size:
    content = bytearray()
  elif kind in ('flip', 'flips'):
    for at in rng.integers(size, size=1 if kind == 'flip' else 8):
      content[at] ^= 1 << int(rng.integers(8))
  elif kind == 'cut':
    del content[int(rng.integers(size)) :]
  elif kind == 'overwritten':
    begin = int(rng.integers(size))
    piece = rng.integers(256, size=min(64, size - begin), dtype=np.uint8)
    content[begin : begin + len(piece)] = piece.tobytes()
  else:
    lines = bytes(content).split(b'\n')
    at = int(rng.integers(max(1, len(lines) - 1)))
    lines[at : at + 1] = {
      'garbage line': [bytes(rng.integers(32, 127, 40, dtype=np.uint8))],
      'blank line': [b''],
      'line gone': [],
    }[kind]
    content = b'\n'.join(lines)
  path.write_bytes(content)
  return kind


def choose(folder: pathlib.Path, rng: np.random.Generator) -> pathlib.Path:
  """A file, every kind of them as likely as any other."""
  groups = collections.defaultdict(list)
  for path in sorted(folder.rglob('*')):
    parts = path.relative_to(folder).parts
    if path.is_file() and not set(OUTPUTS) & set(parts):
      checkpoint = 'checkpoints' in parts and parts.index('checkpoints')
      key = parts[: checkpoint + 3] if checkpoint else parts
      groups[key].append(path)
  files = groups[sorted(groups)[int(rng.integers(len(groups)))]]
  # Orbax's own names of data files are drawn anew each time.
  name = lambda path: re.sub('[0-9a-f]{20,}', '', str(path))
  files.sort(key=lambda path: (name(path), path.stat().st_size))
  return files[int(rng.integers(len(files)))]


def names_it(said: str, name: pathlib.PurePath) -> bool:
  """Whether a line names the file, or the thing that it is a part of."""
  parts = name.parts
  wanted = [name.name]
  if 'checkpoints' in parts:
    step = parts[parts.index('checkpoints') + 1]
    wanted = [f'checkpoint {step} is damaged', 'every checkpoint in']
    wanted += [f'checkpoints/{step}']
  if parts[0] == 'data':
    wanted = ['data/longctx_task', 'data holds no prepared']
  return any(any(w in line for w in wanted) for line in said.splitlines())


def verdict(ended: Ended, found, expected, name: pathlib.PurePath) -> str:
  """'equal', 'told' or 'refused'; what is wrong otherwise."""
  if isinstance(ended.code, str) or 'Traceback' in ended.said:
    return f'WRONG: traceback: {ended.code} {ended.said[-300:]}'
  if ended.code:
    errors = [x for x in ended.said.splitlines() if x.startswith('error: ')]
    if len(errors) != 1 or not names_it(errors[0], name):
      return f'WRONG: exit {ended.code}, the file unnamed: {ended.said[-300:]}'
    return 'refused'
  if found == expected:
    return 'equal'
  # A name that is not among those of an undamaged workdir is of an old file.
  for key, value in expected.items():
    mine = found.get(key)
    if 'checkpoints' in name.parts and 'metrics' not in key:
      # By the parameters of the checkpoint before it, which the lines tell.
      mine = [x for x in mine if '"step": 10' not in x.replace('\\', '')]
    if pathlib.PurePath(key).name in LOGS:
      over = collections.Counter(mine or []) - collections.Counter(value)
      good = not over
    else:
      good = mine == value or pathlib.PurePath(key).name == 'results.json'
    if not good:
      return f'WRONG: {key} is another: {ended.said[-300:]}'
  if not names_it(ended.said, name):
    return f'WRONG: silent change: {ended.said[-300:]}'
  return 'told'


def lines_of(folder: pathlib.Path) -> set[str]:
  """All whole lines of logs, and of what is kept beside them."""
  found = set()
  for path in folder.rglob('*.jsonl*'):
    rows = (line.row for line in log_files.JsonLog(path).lines())
    found |= {json.dumps(strip(row), sort_keys=True) for row in rows if row}
  return found


class Campaign:
  """Workdirs and what comes of them undamaged, made when they are needed."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._expected = {}

  def expected(self, name: str):
    if name not in self._expected:
      scenario, case = SCENARIOS[name], self.folder / 'case'
      shutil.rmtree(case, ignore_errors=True)
      case.mkdir()
      scenario.make(case)
      shutil.copytree(case, self.folder / name)
      ended = run(*scenario.again(case))
      assert ended.code == 0, ended
      self._expected[name] = self.written(name, case)
    return self._expected[name]

  def written(self, name: str, case: pathlib.Path):
    found = outcome(case)
    return {
      k: v for k, v in found.items() if k.endswith(SCENARIOS[name].writes)
    }

  def case(self, seed: int, scenarios=tuple(SCENARIOS)) -> tuple[str, str]:
    """One case, described, and its verdict."""
    rng = np.random.default_rng(seed)
    weights = np.array([SCENARIOS[name].weight for name in scenarios], float)
    name = str(rng.choice(scenarios, p=weights / weights.sum()))
    expected, case = self.expected(name), self.folder / 'case'
    shutil.rmtree(case)
    shutil.copytree(self.folder / name, case)
    path = choose(case, rng)
    kind, file = damage(path, rng), path.relative_to(case)
    before = lines_of(case)
    ended = run(*SCENARIOS[name].again(case))
    said = verdict(ended, self.written(name, case), expected, file)
    if lost := before - lines_of(case):
      said = f'WRONG: lost {len(lost)} good lines: {min(lost)[:80]}'
    return f'{name} {kind} {file}', said


@contextlib.contextmanager
def compiled_once():
  """Keeps compiled steps and initial states between runs of one config."""
  made, init, save = steps.make_steps, steps.init_state, Figure.savefig
  key = lambda config: json.dumps(
    dataclasses.asdict(dataclasses.replace(config, data=type(config.data)())),
    sort_keys=True,
  )
  programs, states = {}, {}

  def make_steps(graph, config, *, placement=None, **options):
    assert placement is None
    return programs.setdefault(key(config), made(graph, config, **options))

  def init_state(model, config, *, placement=None):
    name = key(config)
    if name not in states:
      states[name] = jax.device_get(init(model, config))
    # A training step takes its state's memory.
    return jax.tree.map(jnp.array, copy.copy(states[name]))

  steps.make_steps, steps.init_state = make_steps, init_state
  # Nothing reads a picture.
  Figure.savefig = lambda self, path: pathlib.Path(path).write_bytes(b'png')
  try:
    yield
  finally:
    steps.make_steps, steps.init_state = made, init
    Figure.savefig = save


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--cases', type=int, default=500)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--scenarios', default=','.join(SCENARIOS))
  args = parser.parse_args()
  counts, kinds = collections.Counter(), collections.Counter()
  with tempfile.TemporaryDirectory() as folder, compiled_once():
    campaign = Campaign(pathlib.Path(folder))
    for seed in range(args.seed, args.seed + args.cases):
      what, said = campaign.case(seed, tuple(args.scenarios.split(',')))
      counts[said.split(':')[0]] += 1
      kinds[what.split()[0]] += 1
      done = seed - args.seed + 1
      if done % 25 == 0:
        print(f'{done} cases: {dict(counts)}', file=sys.stderr, flush=True)
      if args.cases <= 10 or said.startswith('WRONG'):
        print(f'seed {seed}: {what}: {said}', flush=True)
  total = ', '.join(f'{n} {name}' for name, n in sorted(counts.items()))
  by_kind = ', '.join(f'{n} {name}' for name, n in sorted(kinds.items()))
  print(f'{args.cases} cases ({by_kind}): {total}')


if __name__ == '__main__':
  main()
