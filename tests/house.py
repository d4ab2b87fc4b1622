"""Rooms of the house, and the arrows that imports draw between them.

    python -m tests.house

counts what the structure is held to: rooms, arrows, arrows that run up, loose
modules, lines. A room is a folder of `longctx`, a module that lies loose in it,
or what stands on it: train.py, eval.py, configs, benchmarks, studies. An arrow
is a pair of rooms of which one imports the other.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# Lowest first: a room imports from rooms below its own, and from no other of
# its own row. All of the package's rooms stand here.
LAYERS = (
  ('typing',),
  ('masks', 'tasks'),
  ('ops',),
  ('parallel',),
  ('costs',),
  ('attention',),
  ('models',),
  ('decoding', 'data'),
  ('pretrained',),
  ('analysis',),
  ('training',),
  ('evaluation', 'plan'),
  ('cli',),
  # The face, resolved lazily, and shims, which `python -m` runs.
  ('__init__', '__main__', 'generate'),
)
LAYER = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# They stand on the package: what it imports of them runs up.
SCRIPTS = ('configs', 'benchmarks', 'studies', 'eval', 'train')

# Those that may lie loose in the package.
LOOSE = {'__init__', '__main__', 'typing'}

# Lines are over their goal: until they are below it, they may not grow.
MOST_LINES = 38_500

GOALS = {'rooms': 24, 'arrows': 112, 'up': 0, 'loose': 3, 'lines': 28_500}


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def modules(*patterns: str) -> dict[str, pathlib.Path]:
  """Files below the root by the name that imports them."""
  found = [path for pattern in patterns for path in ROOT.glob(pattern)]
  return {module_name(path): path for path in sorted(found)}


LIBRARY = modules('longctx/**/*.py')


def imported(name: str, path: pathlib.Path):
  """Yields (absolute module, is inside a function) for each import."""
  package = name if path.name == '__init__.py' else name.rpartition('.')[0]

  def visit(node, inside):
    if isinstance(node, ast.Import):
      yield from ((alias.name, inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        stem = package.split('.')[: len(package.split('.')) - node.level + 1]
        base = '.'.join([*stem, base] if base else stem)
      # 'from longctx.ops import rope' may name a module or a function.
      for alias in node.names:
        full = f'{base}.{alias.name}'
        yield (full if full in LIBRARY else base), inside
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
      yield from visit(child, inside or function)

  yield from visit(ast.parse(path.read_text()), False)


def room(module: str) -> str:
  """'longctx.ops.rope' -> 'ops', 'configs.mqar' -> 'configs', 'jax' -> ''."""
  first, *rest = module.split('.')
  if first == 'longctx':
    return rest[0] if rest else '__init__'
  return first if first in SCRIPTS else ''


def arrows() -> set[tuple[str, str]]:
  """Pairs of rooms of which the first imports the second."""
  files = modules('longctx/**/*.py', '*.py', *(f'{s}/**/*.py' for s in SCRIPTS))
  pairs = {
    (room(name), room(module))
    for name, path in files.items()
    for module, _ in imported(name, path)
  }
  return {(a, b) for a, b in pairs if a and b and a != b}


def runs_up(importing: str, below: str) -> bool:
  """Whether an arrow leads to a room that is not below the first one."""
  rank = LAYER | {name: len(LAYERS) + i for i, name in enumerate(SCRIPTS)}
  return rank[below] >= rank[importing]


def counts() -> dict[str, int]:
  """The figures that GOALS bounds, by the same names."""
  loose = {path.stem for path in ROOT.glob('longctx/*.py')}
  drawn = arrows()
  return {
    'rooms': len({room(name) for name in LIBRARY}) + len(SCRIPTS),
    'arrows': len(drawn),
    'up': sum(runs_up(*arrow) for arrow in drawn),
    'loose': len(loose),
    'lines': sum(
      len(path.read_text().splitlines()) for path in LIBRARY.values()
    ),
  }


def main():
  for name, count in counts().items():
    print(f'{name:<7}{count:>7,}  at most {GOALS[name]:,}')
  for arrow in sorted(arrows()):
    if runs_up(*arrow):
      print(f'runs up: {" -> ".join(arrow)}')


if __name__ == '__main__':
  main()
