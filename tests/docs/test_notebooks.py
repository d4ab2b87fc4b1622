"""Notebooks of the documentation: they run, and become pages."""

import pathlib

import pytest

from docs.tools import notebooks

ROOT = pathlib.Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted(ROOT.glob('docs/notebooks/*.py'))}


@pytest.mark.parametrize('name', FILES)
def test_notebook_runs(name):
  page, pictures = notebooks.to_markdown(notebooks.run(FILES[name]), name)
  assert page.startswith('# ') and '```text' in page
  assert pictures and all(f']({picture})' in page for picture in pictures)


def test_cells_keep_text_and_code_apart():
  text, code = notebooks.parse(
    '# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n'
  )
  assert (text.source, text.is_code) == ('# A\n\nb', False)
  assert (code.source, code.is_code) == ('x = 1', True)
