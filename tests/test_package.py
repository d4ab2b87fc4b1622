"""The package's habits: one-way imports and versions that agree.

Imports are read from the syntax tree, so that a forbidden one is found even
where it would work.
"""

import ast
import configparser
import importlib
import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import house
from tests.house import LAYER, LIBRARY, ROOT, imported, modules

# Pure functions of arrays need no more than these.
PURE = {'jax', 'jaxtyping', 'numpy'}

# Nobody searches for a module or class by these words.
RIDDLES = {'How', 'What', 'Where', 'Whether', 'Which', 'Who'}

# The only imports that may stand inside a function: what an extra brings, or
# what a benchmark compares with when it is there.
OPTIONAL = {'gguf', 'huggingface_hub', 'llama_cpp', 'tensorboardX', 'torch'}
OPTIONAL |= {'transformers'}

# Where the name to import is not the name to install.
DISTRIBUTION = {'absl': 'absl-py', 'orbax': 'orbax-checkpoint'}

SCRIPTS = modules('*.py', 'configs/*.py', 'benchmarks/*.py')
# A module is checked as 'longctx.masks', not as a path of this machine.
library_modules = pytest.mark.parametrize('name', LIBRARY)


def top(module):
  """The room of a module of longctx, '' for others."""
  # What `python -m` runs stands on top, wherever it lies.
  if module.endswith('.__main__'):
    return '__main__'
  return house.room(module) if module.split('.')[0] == 'longctx' else ''


@pytest.mark.parametrize('figure', house.GOALS)
def test_the_house_is_in_order(figure):
  most = house.MOST_LINES if figure == 'lines' else house.GOALS[figure]
  assert house.counts()[figure] <= most, (
    '`python -m tests.house` says which arrows run up'
  )


def test_what_lies_loose_is_known():
  loose = {path.stem for path in ROOT.glob('longctx/*.py')}
  assert loose <= house.LOOSE, 'put it into the room of its purpose'


@library_modules
def test_only_command_lines_import_command_lines(name):
  if top(name) == 'cli':
    return
  for module, _ in imported(name, LIBRARY[name]):
    assert top(module) != 'cli', f'{name} imports {module}'
    # Its exceptions lie in `training.errors`, its call in the face.
    assert module != 'longctx.training.trainer' or name == 'longctx', name


@library_modules
def test_docstrings_begin_with_a_term_to_search_for(name):
  tree = ast.parse(LIBRARY[name].read_text())
  for node in ast.walk(tree):
    if not isinstance(node, ast.Module | ast.ClassDef):
      continue
    where = f'{name}: {getattr(node, "name", "the module")}'
    text = ast.get_docstring(node)
    if not text and getattr(node, 'name', '').startswith('_'):
      continue
    assert text, f'{where} has no docstring'
    first = text.splitlines()[0]
    assert first.split()[0] not in RIDDLES, f'{where} begins with a riddle'
    assert first.endswith('.'), f'{where}: {first!r} ends without a period'


@library_modules
def test_module_imports_on_its_own(name):
  if not name.endswith('__main__'):
    importlib.import_module(name)


@library_modules
def test_imports_point_one_way(name):
  here = top(name)
  for module, _ in imported(name, LIBRARY[name]):
    assert module.split('.')[0] not in ('configs', 'benchmarks', 'tests'), (
      f'{name} imports {module}, which stands on longctx'
    )
    there = top(module)
    if not there or there == here:
      continue
    assert LAYER[there] < LAYER[here], f'{name} imports {module}, not below it'


def test_no_import_cycles():
  graph = {
    name: {m for m, _ in imported(name, path) if m in LIBRARY} - {name}
    for name, path in LIBRARY.items()
    # The face imports what is used, when it is used.
    if name != 'longctx'
  }
  for below in graph.values():
    below.discard('longctx')
  # A package's __init__ imports its files; they do not import it back.
  while leaves := [name for name, below in graph.items() if not below]:
    for leaf in leaves:
      del graph[leaf]
    for below in graph.values():
      below.difference_update(leaves)
  assert not graph, f'modules in or above a cycle: {sorted(graph)}'


@library_modules
def test_pure_layers_import_only_jax_and_numpy(name):
  if top(name) not in ('typing', 'masks', 'ops', 'parallel'):
    return
  for module, _ in imported(name, LIBRARY[name]):
    first = module.split('.')[0]
    assert first in PURE | {'longctx'} | sys.stdlib_module_names, (
      f'{name} imports {module}; ops are functions of arrays alone'
    )


@library_modules
def test_config_dicts_stop_above_analysis(name):
  if LAYER[top(name)] >= LAYER['training']:
    return
  for module, _ in imported(name, LIBRARY[name]):
    assert not module.startswith('ml_collections'), (
      f'{name} imports {module}; pass it a dataclass or arguments'
    )


@pytest.mark.parametrize('name', [*LIBRARY, *SCRIPTS])
def test_no_imports_inside_functions(name):
  for module, inside in imported(name, {**LIBRARY, **SCRIPTS}[name]):
    assert not inside or module.split('.')[0] in OPTIONAL, (
      f'{name} imports {module} inside a function; move it to the top'
    )


def setup_requirements():
  """Each requirement of setup.cfg with the section it stands in."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  sections = dict(parser['options.extras_require'])
  sections['install_requires'] = parser['options']['install_requires']
  return {
    section: [Requirement(line) for line in text.split('\n') if line.strip()]
    for section, text in sections.items()
  }


def pins(python):
  """Distribution -> version in constraints.txt for one Python version."""
  found = {}
  for line in (ROOT / 'constraints.txt').read_text().splitlines():
    if not line.strip() or line.startswith('#'):
      continue
    requirement = Requirement(line)
    marker = requirement.marker
    if marker and not marker.evaluate({'python_version': python}):
      continue
    name = canonicalize_name(requirement.name)
    assert name not in found, f'{name} is pinned twice on Python {python}'
    (pin,) = requirement.specifier
    assert pin.operator == '==', f'{line}: not an exact version'
    found[name] = pin.version
  return found


@pytest.mark.parametrize('python', ['3.11', '3.12'])
def test_constraints_agree_with_setup(python):
  pinned = pins(python)
  for section, requirements in setup_requirements().items():
    for requirement in requirements:
      version = pinned.get(canonicalize_name(requirement.name))
      assert version, f'{section}: {requirement} has no pin'
      assert version in requirement.specifier, f'{requirement}: {version}'


def test_every_dependency_has_a_floor_and_a_ceiling():
  for section, requirements in setup_requirements().items():
    for requirement in requirements:
      # 'jax[tpu]' adds to the range that stands in install_requires.
      operators = {s.operator for s in requirement.specifier}
      expected = set() if requirement.extras else {'>=', '<'}
      assert operators == expected, f'{section}: {requirement}'


@library_modules
def test_every_import_is_a_declared_dependency(name):
  declared = {
    canonicalize_name(requirement.name)
    for requirement in setup_requirements()['install_requires']
  }
  for module, _ in imported(name, LIBRARY[name]):
    first = module.split('.')[0]
    if first in OPTIONAL | {'longctx'} | sys.stdlib_module_names:
      continue
    distribution = canonicalize_name(DISTRIBUTION.get(first, first))
    assert distribution in declared, f'{name} imports {first}: not in setup.cfg'


def test_install_lines_name_this_checkout():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  extras = set(parser['options.extras_require'])
  kinds = ('py', 'md', 'cfg', 'toml', 'txt', 'yml', 'ipynb')
  files = [path for kind in kinds for path in ROOT.glob(f'[!.]*/**/*.{kind}')]
  files += [path for path in ROOT.glob('*') if path.is_file()]
  for path in {*files} - {pathlib.Path(__file__)}:
    text = path.read_text()
    # The index's longctx is another project.
    assert not re.search(
      r'longctx(-jax)?\[|pip install[^`]{0,9}longctx', text
    ), f"{path} names a distribution: write pip install -e '.[extra]'"
    for names in re.findall(r"'\.\[([\w,]+)\]'", text):
      assert {*names.split(',')} <= extras, f"{path} installs '.[{names}]'"


def test_pre_commit_runs_the_pinned_ruff():
  text = (ROOT / '.pre-commit-config.yaml').read_text()
  (rev,) = re.findall(r'rev: v(\S+)', text)
  assert rev == pins('3.11')['ruff'] == pins('3.12')['ruff']
