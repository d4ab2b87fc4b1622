"""Notebooks of the documentation: they run, and become pages."""

import pathlib

import pytest

from docs.tools import notebooks

ROOT = pathlib.Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted(ROOT.glob('docs/notebooks/*.py'))}


# Both train a model; CI runs them twice, in `make test-all` and `make docs`.
TRAINING = ('inside', 'recall')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in TRAINING))
    for name in FILES
  ],
)
def test_notebook_runs(name):
  page, pictures = notebooks.to_markdown(notebooks.run(FILES[name]), name)
  assert page.startswith('# ') and '```text' in page
  assert pictures and all(f']({picture})' in page for picture in pictures)


def test_cells_keep_text_and_code_apart():
  cells = '# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n'
  text, code = notebooks.parse(cells)
  assert (text.source, text.is_code) == ('# A\n\nb', False)
  assert (code.source, code.is_code) == ('x = 1', True)
  assert cells.splitlines()[code.line] == 'x = 1'
