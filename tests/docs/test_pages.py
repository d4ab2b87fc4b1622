"""Pages of the documentation: their code runs, their links and names hold."""

import importlib
import pathlib
import re
import shlex

import pytest

from longctx.attention import VARIANTS
from longctx.cli import commands as cli
from longctx.cli import config_file, flags
from longctx.tasks import TASKS
from longctx.training.config import ExperimentConfig, from_config_dict

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
  path.relative_to(ROOT).as_posix(): path.read_text()
  for path in (
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md')),
    *sorted(ROOT.glob('docs/*.md')),
  )
}
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.DOTALL | re.MULTILINE)
PYTHON = {
  f'{page}-{i}': block
  for page, text in PAGES.items()
  for i, (language, block) in enumerate(FENCE.findall(text))
  if language == 'python'
}
pages = pytest.mark.parametrize('page', PAGES)


def shell_commands(text):
  """Words of each `python …`, in code blocks without a language and inline."""
  for language, block in FENCE.findall(text):
    if not language:
      for line in block.replace('\\\n', ' ').splitlines():
        if line.startswith('python '):
          yield shlex.split(line, comments=True)[1:]
  for line in re.findall(r'`python ([^`]+)`', FENCE.sub('', text)):
    yield shlex.split(' '.join(line.split()))


COMMANDS = {
  ' '.join(words): words
  for text in PAGES.values()
  for words in shell_commands(text)
}


@pytest.mark.parametrize('block', PYTHON)
def test_python_block_runs_on_its_own(block):
  exec(compile(PYTHON[block], block, 'exec'), {'__name__': block})


def test_readme_is_short():
  assert len(PAGES['README.md'].splitlines()) < 150


@pytest.mark.parametrize('page', [p for p in PAGES if p.startswith('docs/')])
def test_page_can_be_reached_from_the_readme(page):
  assert f']({page})' in PAGES['README.md']


def anchor(heading):
  """As a heading's link on the site and in a repository's browser."""
  words = re.sub(r'[^\w\- ]', '', heading.strip().lower())
  return words.replace(' ', '-')


@pages
def test_links_lead_somewhere(page):
  here = (ROOT / page).parent
  for target in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', PAGES[page])):
    if target.startswith(('http://', 'https://')):
      continue
    name, _, place = target.partition('#')
    path = (here / name) if name else ROOT / page
    assert path.exists(), f'{page} links to {target}'
    if place:
      headings = re.findall(r'^#+ (.*)', path.read_text(), re.MULTILINE)
      assert place in map(anchor, headings), f'{page} links to {target}'


@pages
def test_files_that_a_page_names_exist(page):
  folders = 'benchmarks|configs|docs|longctx|studies|tests'
  named = set(re.findall(rf'\b(?:{folders})/[\w/]+\.\w+', PAGES[page]))
  # Files that a reader is told to add.
  named -= set(re.findall(r'^# (longctx/\S+\.py)$', PAGES[page], re.MULTILINE))
  for path in named:
    assert (ROOT / path).exists(), f'{page} names {path}'


@pages
def test_names_of_the_package_resolve(page):
  for name in set(re.findall(r'`(longctx(?:\.\w+)+)`', PAGES[page])):
    parts = name.split('.')
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
      if hasattr(found, part):
        found = getattr(found, part)
        continue
      found = importlib.import_module('.'.join(parts[:i]))


@pages
def test_source_lines_are_not_quoted(page):
  assert not re.findall(r'\.py:\d+', PAGES[page])


@pytest.mark.parametrize('command', COMMANDS)
def test_command_takes_its_arguments(command):
  program, *arguments = COMMANDS[command]
  if program == '-m':
    program = arguments.pop(0)
    path = ROOT / program.replace('.', '/')
    path = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
  else:
    path = ROOT / program
  assert path.is_file(), command
  called = program if program.endswith('.py') else f'-m {program}'
  names = [
    name
    for name, known in cli.COMMANDS.items()
    if known.prog == f'python {called}' or known.prog == f'python {program}'
  ]
  if program == 'longctx.pretrained':
    flags.parse(f'pretrained {arguments[0]}', arguments[1:])
    return
  if not names:
    # Of a benchmark or a study.
    source = path.read_text() + (ROOT / 'studies/common.py').read_text()
    for flag in re.findall(r'--(\w+)', ' '.join(arguments)):
      assert f"'--{flag}'" in source, f'{command}: no flag --{flag}'
    return
  if not arguments:
    return
  (name,) = names
  mode = f'{name} {arguments[0]}'
  if mode in cli.COMMANDS:
    name = mode
    arguments = arguments[1:]
  args = flags.parse(name, arguments)
  if getattr(args, 'config', None):
    config = config_file.load(args.config, args.overrides)
    from_config_dict(ExperimentConfig, config)


@pytest.mark.parametrize('name', VARIANTS)
def test_variant_has_a_row(name):
  assert re.search(
    rf'^\| `{re.escape(name)}\b', PAGES['docs/variants.md'], re.MULTILINE
  )


@pytest.mark.parametrize('name', TASKS)
def test_task_has_a_row(name):
  assert re.search(
    rf'^\| `{re.escape(name)}\b', PAGES['docs/tasks.md'], re.MULTILINE
  )
