"""The page of an analysis: complete, in one file, and true to the numbers."""

import html.parser
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import parallel
from longctx.analysis import (
  findings,
  maps,
  markup,
  model_scores,
  probes,
  report,
)
from longctx.analysis.glossary import SCORES
from longctx.attention import AttentionConfig, make_attention
from longctx.attention.context import Context
from longctx.cli import analyze, flags
from longctx.parallel import Placement
from longctx.parallel.layout import SequenceLayout
from longctx.training import runs, trainer
from tests.tiny import tiny_config, tiny_layer

HEADS = 2


class Page(html.parser.HTMLParser):
  """Tags that are open, addresses of what is loaded, and titles of cells."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.loaded, self.cells = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.loaded += [found[key] for key in ('src', 'href') if key in found]
    if tag == 'td' and 'title' in found:
      self.cells.append(found['title'])
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    """Opens nothing."""

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Two kinds of layers and one that lacks 'analysis', 12 steps."""
  folder = tmp_path_factory.mktemp('run')
  layers = ('full', 'linear', tiny_layer('nsa'))
  config = tiny_config(model={'layers': layers})
  trainer.train(runs.prepare(config, folder), folder)
  return folder


@pytest.fixture(scope='module')
def written(workdir):
  """(text of the page, numbers)."""
  flags.run('analysis', [f'--workdir={workdir}', '--rows=2'])
  folder = workdir / 'analysis'
  numbers = json.loads((folder / 'analysis.json').read_text())
  return (folder / 'report.html').read_text(), numbers


def test_page_is_one_file(written):
  text, _ = written
  page = Page(text)
  assert not page.open
  assert page.loaded and all(at.startswith('data:') for at in page.loaded)
  assert 'http:' not in text and 'https:' not in text
  assert '<script' not in text and '@import' not in text


def test_every_score_of_every_head_has_a_cell(written):
  text, numbers = written
  cells = Page(text).cells
  scores = numbers['scores']
  by_head = [
    name
    for name, values in scores.items()
    if isinstance(values, list)
    and all(isinstance(v, list) for v in values if v is not None)
    and np.ndim(next(v for v in values if v is not None)) == 1
  ]
  assert set(by_head) <= set(SCORES)
  for name, layer in (('first_token', '0 full'), ('mass', '1 linear')):
    values = scores[name][int(layer[0])]
    assert len(values) == HEADS
    for head, value in enumerate(values):
      assert f'{layer}, {head}: {value:.6g}' in cells
  assert len(Page(text).loaded) == 2 * 2 * HEADS


def test_layers_without_scores_say_why(written):
  text, numbers = written
  assert numbers['scores']['first_token'][2] is None
  assert '2 nsa, 0: no such score' in Page(text).cells
  assert markup.escape(numbers['layers'][2]['lacks']) in text


def test_numbers_say_what_was_measured(written, workdir):
  _, numbers = written
  assert (numbers['step'], numbers['rows'], numbers['split']) == (
    12,
    2,
    'validation',
  )
  assert [layer['is_recurrence'] for layer in numbers['layers'][:2]] == [
    False,
    True,
  ]
  assert len(numbers['ablation']['each']) == 3
  assert numbers['config']['task']['name'] == numbers['task']['name']
  assert str(workdir) in numbers['command']


def test_another_length_and_an_older_checkpoint(workdir):
  argv = ['--seq_len=24', '--step=10', f'--out={workdir}/other/page.html']
  args = flags.parse('analysis', [f'--workdir={workdir}', *argv])
  (job,) = analyze.find_jobs(args)
  assert (job.task.seq_len, job.trained.step) == (24, 10)
  assert job.numbers == workdir / 'other' / 'page.json'


@pytest.mark.parametrize('value', [None, float('nan'), float('inf')])
def test_what_is_no_number_is_a_dash(value):
  assert markup.number(value) == '–'


def test_cells_are_filled_up_with_dashes():
  text = markup.table(
    [[0.5], []], names=['a', 'b'], columns=['0', '1'], top=1.0
  )
  assert re.findall(r'<td[^>]*>([^<]*)', text) == ['0.500', '–', '–', '–']
  assert 'title="a, 0: 0.5"' in text


def test_decimals_of_a_column_stand_below_each_other():
  text = markup.table(
    [[0.5, 0.5], [12.25, 0.25]], names=['a', 'b'], columns=['0', '1']
  )
  cells = re.findall(r'<td[^>]*>([^<]*)', text)
  assert cells == ['0.5', '0.500', '12.2', '0.250']


def make(layer):
  config = AttentionConfig(
    d_model=8, num_heads=4, num_kv_heads=4, head_dim=4, value_dim=4
  )
  layer = make_attention(layer, config, rngs=nnx.Rngs(0))
  return layer, 2 * jax.random.normal(jax.random.key(1), (2, 13, 8))


@pytest.mark.parametrize('layer', ['full', 'linear', 'deltanet'])
@pytest.mark.parametrize('size', [5, 64])
def test_pooled_map_is_the_matrix_in_blocks(layer, size):
  layer, x = make(layer)
  T = x.shape[1]
  found = maps.pooled_map(layer, x, Context(), seq_len=T, size=size)
  A = np.asarray(probes.weighted_sums(layer, x, jnp.eye(T)[None], Context()))
  M = min(size, T)
  block = np.arange(T) * M // T
  means = [
    [A[:, block == q][..., block == s].mean((1, 3)) for s in range(M)]
    for q in range(M)
  ]
  expected = np.moveaxis(np.array(means), (0, 1), (2, 3))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pooled_map_is_the_same_on_a_mesh():
  layer, x = make('full')
  T = x.shape[1]
  expected = maps.pooled_map(layer, x, Context(), seq_len=T, size=5)
  mesh = parallel.make_mesh(seq=4)
  placement = Placement(mesh, SequenceLayout('zigzag', T, 4), 'ring')
  place = model_scores.placer(placement)
  found = jax.jit(
    lambda x: maps.pooled_map(
      layer, place(x), Context(placement=placement), seq_len=T, size=5
    )
  )(x)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_maps_with_negative_values_are_drawn_with_signs():
  values = np.array([[1.0, 0.0], [0.5, -0.5]], np.float32)
  assert markup.is_signed(values) and not markup.is_signed(np.abs(values))
  assert 'data:image/png;base64,' in markup.picture(values, 'a', seq_len=2)


NUMBERS = {
  'layers': [
    {'name': 'full', 'is_recurrence': False, 'lacks': None},
    {'name': 'linear', 'is_recurrence': True, 'lacks': None},
  ],
  'scores': {
    'prefix_matching': [[0.0, 0.1], [0.9, 0.8]],
    'previous_token': [[0.5, 0.2], None],
    'first_token': [[0.1, 0.2], [0.0, 0.25]],
    'massive': [2.0, 1500.0],
    'icl_score': -1.5,
  },
  'ablation': {
    'accuracy': 1.0,
    'each': [[1.0, 1.0], [0.6, 0.999]],
    'induction': {
      'heads': [[1, 0], [1, 1]],
      'accuracy': 0.017,
      'mean_accuracy': 0.02,
    },
    'previous_token': {
      'heads': [[0, 0]],
      'accuracy': 0.999,
      'mean_accuracy': 1.0,
    },
  },
}
CHANGE = {
  'step': 200,
  'low': 150,
  'high': 1250,
  'before': 0.08,
  'after': 0.99,
  'width': 41.2,
}


def test_findings_are_what_the_numbers_say():
  said = ' '.join(findings.findings(NUMBERS, CHANGE))
  for claim in (
    'Heads 1.0–1.1 are induction heads (prefix matching 0.800 to 0.900). '
    'Without them accuracy falls from 1.000 to 0.017',
    'Head 0.0: previous-token head (previous token 0.500). Without it '
    'accuracy stays at 0.999',
    'No attention sink: the largest first token is 0.250, of head 1.1',
    'missed most is 1.0: without it alone accuracy falls from 1.000 to 0.600',
    '1,500.0 times the median one, before layer 1: massive',
    'costs 1.500 nats less',
    'went from 0.080 to 0.990, halfway at step 200 (between 150 and 1,250) '
    'and most of the way within 41 steps',
    'Layer 1 is a recurrence',
  ):
    assert claim in said


def test_summary_in_the_terminal_has_every_finding(written, capsys):
  _, numbers = written
  text = findings.summary(numbers, CHANGE)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 80
  assert '2 validation rows' in lines[0] and 'step 12' in lines[0]
  words = ' '.join(text.split())
  assert all(said in words for said in findings.findings(numbers, CHANGE))


def test_axes_of_a_map_are_positions():
  text = markup.picture(np.ones((4, 4), np.float32), 'a', seq_len=1024)
  assert re.findall(r'<text[^>]*>([^<]*)', text) == [
    *('0', '0', '512', '512', '1,023', '1,023', 'key', 'query')
  ]


def test_heads_side_by_side_are_listed_as_one():
  heads = [[0, 1], [0, 2], [0, 3], [1, 0], [2, 3]]
  assert findings.heads_listed(heads) == '0.1–0.3, 1.0, 2.3'


def test_timeline_has_the_phase_change_and_the_scores_over_steps(written):
  _, numbers = written
  rows = [
    {'step': step, 'split': split, 'accuracy': 0.1, 'loss': 2.0}
    for step in (100, 200)
    for split in ('train', 'validation')
  ]
  measured = {'prefix_matching': [[0.1, 0.7], None], 'sink_rate': None}
  rows += [
    {'step': 100, 'split': 'analysis', 'icl_score': -0.5, **measured},
    {'step': 100, 'split': 'ablation', 'accuracy': 0.625, 'each': []},
  ]
  results = {'phase_change': CHANGE}
  pictures = [np.zeros((1, 1, 2, 2)), None, None]
  plain = report.report(numbers, pictures, rows=rows[:4], results={})
  text = report.report(numbers, pictures, rows=rows, results=results)
  assert not Page(text).open
  assert plain.count('class="band"') == 0 < text.count('class="band"')
  assert 'prefix matching at 100: 0.700' in text
  assert '100, all heads: 0.625' in text and 'over steps</h3>' not in plain


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--workdir=/nowhere'], '/nowhere is no workdir'),
    (['--run=b'], "there is no run 'b'"),
    (['--rows=0'], '--rows=0 must be at least 1'),
    (['--seq_len=1'], 'seq_len=1'),
    (['--step=3'], 'there is no checkpoint 3'),
    (['--out=page.txt'], 'must end in .html'),
  ],
)
def test_command_ends_with_one_line(workdir, options, message, capsys):
  with pytest.raises(SystemExit) as end:
    flags.run('analysis', [f'--workdir={workdir}', *options])
  assert end.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error
  assert error.count('\n') == 1
