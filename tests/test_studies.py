"""Studies: medians, claims and the report, from measurements made up here."""

import dataclasses
import json
import pathlib
import sys

import pytest

from longctx.attention import VARIANTS
from longctx.cli import config_file
from longctx.training import figures, log_files
from studies import all as all_studies
from studies import claims, jobs, report
from studies.claims import Figure
from studies.common import Job, Study, main
from studies.copying import bound
from studies.retrieval import config as retrieval_config
from studies.retrieval import run as retrieval
from studies.window_schedule import run as window_schedule

STUDIES = all_studies.names()
ROOT = pathlib.Path(__file__).parent.parent


def row(seed, accuracy, run='full'):
  return {
    'run': run,
    'seed': seed,
    'accuracy': accuracy,
    'command': 'python train.py',
    'commit': 'abc1234',
    'hardware': 'a machine',
  }


accuracy = claims.of('accuracy')('full')


@pytest.mark.parametrize(
  ('values', 'high_is_good', 'expected'),
  [
    ([0.1, 0.9, 0.5], True, (0.5, 0.1, 0.9)),
    ([0.1, 0.9], True, (0.5, 0.1, 0.9)),
    ([300, None, 200], False, (300, 200, None)),
    ([None, None, 200], False, (None, 200, None)),
    ([0.9, None, 0.8], True, (0.8, None, 0.9)),
  ],
)
def test_spread_is_median_and_range_with_missing_worst(
  values, high_is_good, expected
):
  found = claims.spread(values, high_is_good=high_is_good)
  assert (found['median'], found['low'], found['high']) == expected


def test_claim_is_ok_where_the_median_meets_the_bar():
  rows = [row(0, 0.2), row(1, 0.99), row(2, 1.0)]
  found = claims.conclude(
    {
      'it answers': accuracy >= 0.9,
      'it does not': accuracy <= 0.5,
      'it never got there': Figure(lambda rows: None) - accuracy >= 0,
    },
    rows,
    command='python -m studies.one.run',
  )
  first = found[0]
  assert [entry['ok'] for entry in found] == [True, False, False]
  assert (first['figure'], first['low'], first['high']) == (0.99, 0.2, 1.0)
  assert first['seeds'] == [0, 1, 2] and first['bar'] == '>= 0.9'
  assert first['commit'] == 'abc1234' and first['hardware'] == 'a machine'
  assert claims.failed(found) == found[1:]
  assert '| it never got there | never | never to never |' in claims.table(
    found
  )


def test_quick_checks_only_claims_made_for_it(tmp_path):
  study = dataclasses.replace(
    fake_study(tmp_path),
    quick={'always': accuracy >= 0.9},
    claims={'in full': accuracy / accuracy <= 1},
  )
  for quick, expected in ((True, ['always']), (False, ['always', 'in full'])):
    found = study.conclude([row(0, 0.1)], command='', quick=quick)
    assert [entry['claim'] for entry in found] == expected


def test_claim_has_a_bar():
  with pytest.raises(ValueError, match="'vague' needs a bar"):
    claims.conclude({'vague': accuracy}, [row(0, 0.1)], command='')


def test_best_and_worst_of_runs_are_claimed_together():
  runs = {'a': {'accuracy': 0.25}, 'b': {'accuracy': 1.0}}
  both = list(map(claims.of('accuracy'), runs))
  assert claims.largest(both)(runs) == 1.0
  assert (claims.largest(both) - claims.least(both))(runs) == 0.75


def fake_study(folder, *, bar=0.9):
  """A study whose trainings write a number and a version, nothing else."""
  script = folder / 'train.py'
  script.write_text(
    'import json, pathlib, sys\n'
    "args = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])\n"
    "out = pathlib.Path(args['workdir'])\n"
    "count = out / 'count'\n"
    "count.write_text(count.read_text() + '.' if count.exists() else '.')\n"
    "value = {'accuracy': float(args['config.value'])}\n"
    "(out / 'results.json').write_text(json.dumps(value))\n"
    "versions = {'commit': 'abc1234567', 'device': 'cpu', 'cpus': 2}\n"
    "versions |= {'platform': 'cpu', 'jax': '0'}\n"
    "(out / 'versions.json').write_text(json.dumps(versions))\n"
  )

  class FakeJob(Job):
    def commands(self, workdir):
      train, *rest = super().commands(workdir)
      return [[str(script), *train[1:]], *rest]

  def make(seed, quick):
    overrides = {'value': 0.9 + 0.01 * seed}
    return [FakeJob(run='full', seed=seed, config='x', overrides=overrides)]

  def measure(job, workdir):
    return json.loads((workdir / 'results.json').read_text())

  return Study(
    name='fake',
    doc='',
    jobs=make,
    measure=measure,
    claims={'it answers': accuracy >= bar},
  )


def run_fake(tmp_path, study, *more):
  out = tmp_path / 'studies' / 'fake'
  options = [f'--workdir={tmp_path / "runs"}', f'--out={out}', *more]
  return main(study, options), out


def test_study_runs_its_jobs_and_writes_its_files(tmp_path):
  found, out = run_fake(tmp_path, fake_study(tmp_path), '--processes=2')
  lines = log_files.read_lines(out / 'results.jsonl')
  assert [line['seed'] for line in lines] == [0, 1, 2]
  assert [line['accuracy'] for line in lines] == [0.9, 0.91, 0.92]
  assert {line['commit'] for line in lines} == {'abc1234'}
  assert all('runs/fake/full-seed' in line['command'] for line in lines)
  assert str(tmp_path / 'runs') not in (out / 'results.jsonl').read_text()
  assert json.loads((out / 'results.json').read_text()) == found
  assert found[0]['figure'] == 0.91 and found[0]['ok']


def test_finished_jobs_are_not_run_again_and_changed_ones_are(tmp_path):
  study = fake_study(tmp_path)
  run_fake(tmp_path, study)
  run_fake(tmp_path, study)
  count = tmp_path / 'runs' / 'full-seed0' / 'count'
  assert count.read_text() == '.'
  job = study.jobs(0, False)[0]
  changed = type(job)(run='full', seed=0, config='y', overrides=job.overrides)
  jobs.run_all([changed], tmp_path / 'runs')
  assert count.read_text() == '..'


def test_failing_job_ends_the_study_and_names_its_log(tmp_path):
  study = fake_study(tmp_path)
  (tmp_path / 'train.py').write_text('import sys; sys.exit(3)')
  with pytest.raises(SystemExit, match=r'ended with 3: .*log\.txt'):
    run_fake(tmp_path, study)


def test_report_has_every_claim_and_picture(tmp_path):
  _, out = run_fake(tmp_path, fake_study(tmp_path, bar=0.915))
  (out / 'accuracy.png').write_bytes(b'')
  text = report.report(tmp_path)
  assert '[fake](studies/fake/README.md) | 0 of 1' in text
  assert '| it answers | 0.910 | 0.900 to 0.920 | >= 0.915 | **no** |' in text
  assert '![accuracy.png](studies/fake/accuracy.png)' in text
  assert 'Command: `python -m studies.fake.run`' in text


def test_all_ends_with_one_where_a_claim_fails(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(report, 'main', lambda: None)
  for bar, code in ((0.9, 0), (1.0, 1)):
    study = fake_study(tmp_path, bar=bar)
    monkeypatch.setattr(all_studies, 'load', lambda name, s=study: s)
    monkeypatch.setattr(
      all_studies, 'main', lambda s, options: run_fake(tmp_path, s)[0]
    )
    assert all_studies.run(['--only=fake']) == code
  assert 'do not hold' in capsys.readouterr().err


@pytest.mark.parametrize('quick', [False, True], ids=['full', 'quick'])
@pytest.mark.parametrize('name', STUDIES)
def test_jobs_of_a_study_have_configs_that_load(name, quick, monkeypatch):
  monkeypatch.chdir(ROOT)
  study = all_studies.load(name)
  made = study.jobs(0, quick)
  assert study.name == name
  names = [job.run for job in made]
  assert len(set(names)) == len(names)
  for job in made:
    config = config_file.load_config_file(job.config)
    train = job.commands('w')[0]
    config_file.check_overrides(config, [sys.executable, *train])


# Of the zoo the lines of each seed were not kept when it was measured.
@pytest.mark.parametrize('name', [name for name in STUDIES if name != 'zoo'])
def test_results_of_a_study_are_those_of_its_lines(name):
  """What is committed was made by the claims that the study now has."""
  study = all_studies.load(name)
  rows = log_files.read_lines(study.folder / 'results.jsonl')
  found = json.loads((study.folder / 'results.json').read_text())
  again = study.conclude(rows, command=found[0]['command'])
  assert json.loads(json.dumps(again)) == found


@pytest.mark.parametrize('name', STUDIES)
def test_figure_of_a_study_names_and_tells_apart_whatever_it_draws(
  name, tmp_path, monkeypatch
):
  drawn = []
  monkeypatch.setattr(
    figures, 'save', lambda figure, path: drawn.append(figure)
  )
  study = all_studies.load(name)
  variants = (ROOT / 'studies/zoo/variants.json').read_text()
  (tmp_path / 'variants.json').write_text(variants)
  lines = study.folder / 'results.jsonl'
  study.show(log_files.read_lines(lines) if lines.exists() else [], tmp_path)
  tables = [folder / 'table.md' for folder in (tmp_path, study.folder)]
  assert tables[0].read_text() == tables[1].read_text()
  (figure,) = drawn
  assert figure.get_suptitle()
  (legend,) = figure.legends
  named = [text.get_text() for text in legend.get_texts()]
  assert len(set(named)) == len(named)
  looks = {}
  for axis in figure.axes:
    assert axis.get_xlabel() or axis.get_xticklabels()[0].get_text()
    for line in axis.get_lines():
      if line.get_label() in named:
        look = line.get_color(), line.get_marker(), line.get_linestyle()
        looks.setdefault(line.get_label(), set()).add(look)
      else:
        # What has no label continues a line that has one: marks of its seeds.
        look = line.get_color(), line.get_marker()
        assert look in {(c, m) for c, m, _ in set().union(*looks.values())}
    if axis.collections:
      assert any('range' in text for text in named)
  # A mechanism is a line in one plot and marks in another.
  assert all(len({(c, m) for c, m, _ in at}) == 1 for at in looks.values())
  joined = [look for at in looks.values() for look in at]
  assert len(set(joined)) == len(joined)


def test_every_name_has_a_style_of_its_own_and_a_mechanism_keeps_it():
  names = [*sorted(VARIANTS), *(f'run {n}' for n in range(30))]
  styles = figures.styles(names)
  assert len({(s['color'], s['marker']) for s in styles.values()}) == len(names)
  assert figures.styles(['window', 'deltanet-tiny', 'linear']) == {
    'window': styles['sliding_window'],
    'deltanet-tiny': styles['deltanet'],
    'linear': styles['linear'],
  }
  two = figures.styles(['linear-tiny', 'linear'])
  assert two['linear'] == styles['linear'] != two['linear-tiny']


def test_report_at_the_top_level_is_the_current_one():
  assert (ROOT / 'REPORT.md').read_text() == report.report(), (
    'run python -m studies.report'
  )


def test_bound_on_copying_is_tight_where_the_state_holds_the_string():
  assert bound.least_error(10 * bound.BITS_OF_LETTER, 10) == 0
  assert bound.least_error(10 * bound.BITS_OF_LETTER, 11) == pytest.approx(
    25 / 26
  )
  assert bound.effective_bits([5, 10], [1.0, 0.0]) == pytest.approx(
    5 * bound.BITS_OF_LETTER
  )
  # Half of the strings of 10 letters need one bit less than all of them.
  assert bound.effective_bits([5, 10], [1.0, 0.5]) == pytest.approx(
    10 * bound.BITS_OF_LETTER - 1
  )
  assert bound.effective_bits([5], [0.0]) == 0


def test_rank_correlation_shares_ranks_of_equal_values():
  correlation = retrieval.rank_correlation
  assert correlation([1, 2, 3], [10, 20, 99]) == pytest.approx(1)
  assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
  # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
  assert correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)


def test_recall_is_ranked_against_bytes_over_all_sizes():
  figure = retrieval.follows_bytes('recalled')
  rows = {
    f'sizes/{name}': {'state_bytes': size, 'recalled': recalled}
    for name, size, recalled in (('a', 10, 1), ('b', 100, 5), ('c', 999, 64))
  }
  rows |= {'capacity/d': {'state_bytes': 1, 'capacity': 9}, 'curves/e': {}}
  assert figure(rows) == pytest.approx(1)
  rows['sizes/c']['recalled'] = 0
  assert figure(rows) == pytest.approx(-0.5)


def test_a_memory_of_sizes_has_a_run_for_every_rate():
  config = retrieval_config.get_config('sizes/window 8')
  rates = [run.optimizer.learning_rate for run in config.runs.values()]
  assert sorted(rates) == [1e-3, 3e-3, 1e-2]
  assert len(retrieval_config.get_config('sizes').runs) == 3 * len(
    retrieval_config.SIZES
  )
  one = retrieval_config.get_config('sizes/window 8 at 1e-2')
  assert list(one.runs) == ['window 8 at 1e-2']
  with pytest.raises(ValueError, match="unknown memory 'window 9'"):
    retrieval_config.get_config('sizes/window 9')


def test_published_order_of_schedules_counts_neighbours():
  names = ('decreasing', 'fixed', 'increasing', 'dilated')
  rows = {n: {'bits': b} for n, b in zip(names, (4, 3, 3.5, 1), strict=True)}
  assert window_schedule.steps_in_order(rows) == 2
