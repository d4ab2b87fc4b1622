"""Site hooks of MkDocs: pages from outside docs/, API reference, notebooks.

Pages that live elsewhere in the repository are added under names of their own,
and links between pages are turned to those. A link to a file that the site does
not show, such as a config, becomes its path.
"""

import ast
import os
import pathlib
import posixpath
import re
import subprocess
import sys
import tempfile

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import longctx

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = ('recall', 'own_variant', 'ring', 'inside')

# File of the repository -> page of the site.
ELSEWHERE = {
  'README.md': 'index.md',
  'CONTRIBUTING.md': 'contributing.md',
  'CHANGELOG.md': 'changelog.md',
  'REPORT.md': 'report.md',
}
for _path in sorted(ROOT.glob('studies/*/README.md')):
  ELSEWHERE[_path.relative_to(ROOT).as_posix()] = (
    f'studies/{_path.parent.name}.md'
  )
LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)')


def modules() -> list[str]:
  """Modules of the package with a docstring and something public in them."""
  found = []
  for path in sorted(ROOT.glob('longctx/**/*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] == '__main__' or any(p.startswith('_') for p in parts[:-1]):
      continue
    tree = ast.parse(path.read_text())
    if ast.get_docstring(tree):
      found.append('.'.join(p for p in parts if p != '__init__'))
  return found


def site_page(path: str) -> str | None:
  """The page of the site that shows a file of the repository."""
  if path in ELSEWHERE:
    return ELSEWHERE[path]
  if re.fullmatch(r'docs/notebooks/\w+\.py', path):
    return path.removeprefix('docs/').removesuffix('.py') + '.md'
  if path.startswith('docs/'):
    return path.removeprefix('docs/')
  return path if path.endswith('.png') else None


def turn_links(markdown: str, source: str, page: str) -> str:
  """Links as they go from a page of the site.

  Args:
    markdown: text whose links go from the file `source` of the repository.
    source: path of that file, from the root of the repository.
    page: path of the page on the site.
  """

  def turn(match: re.Match) -> str:
    picture, text, target = match.groups()
    if target.startswith(('http://', 'https://', '#')):
      return match.group()
    path, mark, place = target.partition('#')
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    there = site_page(path)
    if there is None:
      return text if text.startswith('`') else f'{text} (`{path}`)'
    there = posixpath.relpath(there, posixpath.dirname(page) or '.')
    return f'{picture}[{text}]({there}{mark}{place})'

  return LINK.sub(turn, markdown)


def run_notebooks(folder: pathlib.Path) -> None:
  """Runs the notebooks, two at a time, and writes pages and pictures.

  Raises:
    RuntimeError: a notebook failed.
  """
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'MPLBACKEND': 'Agg',
    # Compiling is most of the time; the tests leave programs in this folder.
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.pytest_cache' / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }
  waiting, running = list(NOTEBOOKS), {}
  while waiting or running:
    while waiting and len(running) < 2:
      name = waiting.pop(0)
      command = [sys.executable, '-m', 'docs.tools.notebooks']
      command += [f'docs/notebooks/{name}.py', str(folder)]
      running[name] = subprocess.Popen(command, cwd=ROOT, env=environment)
    name = next(iter(running))
    if running.pop(name).wait():
      raise RuntimeError(f'docs/notebooks/{name}.py failed, see above')


def _tree(names: list[str]) -> list:
  """Navigation to the pages of modules, those of a package under its own."""
  below = {name: [] for name in names}
  for name in names[1:]:
    parent = name.rpartition('.')[0]
    below[parent if parent in below else names[0]].append(name)

  def entry(name: str) -> str | dict:
    page = f'api/{name}.md'
    title = name.rpartition('.')[2]
    return {title: [page, *map(entry, below[name])] if below[name] else page}

  return [f'api/{names[0]}.md', *map(entry, below[names[0]])]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Completes the navigation by the API reference and the project's pages.

  A page of docs/ that mkdocs.yml does not name stands at the end of the guides.
  """
  named = set(re.findall(r"'([^']+\.md)'", repr(config.nav)))
  others = sorted({path.name for path in ROOT.glob('docs/*.md')} - named)
  for entry in config.nav:
    if 'API' in entry:
      entry['API'] = _tree(modules())
    if 'Guides' in entry:
      entry['Guides'].extend(others)
    if 'Project' in entry:
      entry['Project'] = [
        {'Contributing': 'contributing.md'},
        {'Changelog': 'changelog.md'},
      ]
    if 'Results' in entry:
      studies = [p for p in ELSEWHERE.values() if p.startswith('studies/')]
      entry['Results'].append({'Studies': ['report.md', *studies]})
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds pages that do not lie in docs/."""

  def add(name: str, content: str | bytes) -> None:
    files.append(File.generated(config, name, content=content))

  for source, page in ELSEWHERE.items():
    add(page, turn_links((ROOT / source).read_text(), source, page))
    for picture in (ROOT / source).parent.glob('*.png'):
      add(picture.relative_to(ROOT).as_posix(), picture.read_bytes())
  # The docstring of the face is complete once it is imported, at no cost.
  add('api/longctx.md', f'# longctx\n\n{longctx.__doc__}')
  for module in modules()[1:]:
    add(f'api/{module}.md', f'# {module}\n\n::: {module}\n')
  with tempfile.TemporaryDirectory() as folder:
    run_notebooks(pathlib.Path(folder))
    for path in sorted(pathlib.Path(folder).iterdir()):
      content = path.read_bytes()
      if path.suffix == '.md':
        page, source = f'notebooks/{path.name}', f'docs/notebooks/{path.name}'
        content = turn_links(content.decode(), source, page)
      add(f'notebooks/{path.name}', content)
  return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
  """Turns the links of pages in docs/, which go through the repository."""
  if page.file.generated_by:
    return markdown
  name = page.file.src_uri
  return turn_links(markdown, f'docs/{name}', name)
