"""System 2 Attention: rewriting, and a hard gate, against opinions.

    python -m studies.s2a.run
    python -m studies.s2a.run --quick

Trains the runs of configs/s2a.py and asks them questions of the test split:
every method in every condition, more distractors than in training, a crowd of
opinions, and contexts of 65,536 tokens.
"""

from longctx.training import log_files
from studies.claims import Figure, largest, least, of_run
from studies.common import Job, Study, main
from studies.s2a.plot import show

COUNTS = (1, 4, 16, 64, 256)
# As in the middle of training, and in the first questions here.
USUAL = 8
# 16,384 units of four tokens, less those of facts and opinions.
LONG = 16120


def jobs(seed: int, quick: bool) -> list[Job]:
  ask = lambda *more: (
    'eval.py',
    's2a',
    '--workdir={workdir}',
    *more,
  )
  if quick:
    return [
      Job(
        run='s2a',
        seed=seed,
        config='configs/s2a.py:gate',
        overrides={'steps': 600},
        then=(ask('--conditions=suggest_wrong', '--questions=128'),),
      )
    ]
  counts = ','.join(map(str, COUNTS))
  return [
    # Opinions as good as facts, where the config has better ones.
    Job(
      run='even',
      seed=seed,
      config='configs/s2a.py:rewriter',
      overrides={'task.agree': 0.9},
      then=(ask('--questions=512'),),
    ),
    Job(
      run='s2a',
      seed=seed,
      config='configs/s2a.py',
      then=(
        ask('--questions=512'),
        ask(
          '--conditions=none,suggest_wrong',
          f'--distractors={counts}',
          '--methods=baseline,oracle,s2a',
        ),
        # More of one opinion than there ever were in training.
        ask(
          '--conditions=suggest_wrong',
          '--opinions=8',
          '--methods=baseline,oracle,s2a,keep_original,instructed',
        ),
        # The fact is said once, and one span may pass.
        ask(
          '--run=gate',
          '--conditions=none,suggest_wrong',
          f'--distractors={counts},{USUAL}',
          '--keep=1',
        ),
        ask(
          '--run=gate,window',
          '--conditions=suggest_wrong',
          '--distractors=256',
          f'--sentences={LONG}',
          '--mentions=3',
          '--questions=64',
          '--batch_size=8',
          '--chunk=4096',
        ),
      ),
    ),
  ]


def measure(job: Job, workdir) -> list[dict]:
  found = []
  for row in log_files.read_lines(workdir / 's2a.jsonl'):
    model = 'even' if job.run == 'even' else row['run']
    found.append({**row, 'model': model, 'run': name_of({**row, 'run': model})})
  return found


def name_of(row) -> str:
  """What a row is of: 'rewriter/s2a suggest_wrong 8', and what is unusual."""
  who = {'gate': row['run'], 'baseline': f'{row["run"]}/baseline'}.get(
    row['method'], f'{row["run"]}/{row["method"]}'
  )
  name = f'{who} {row["condition"]} {row["distractors"]}'
  if row['opinions'] > 1:
    name += f' opinions={row["opinions"]}'
  if row['sentences'] == LONG:
    name += ' long'
  if row.get('keep'):
    name += f' keep={row["keep"]}'
  return name


def of(
  key: str,
  who: str,
  condition: str = 'suggest_wrong',
  n: int = USUAL,
  more: str = '',
) -> Figure:
  return of_run(lambda row: row.get(key))(f'{who} {condition} {n}{more}')


@Figure
def least_step(rows) -> float:
  """The smallest difference along S2A > KeepOrig > Instructed > baseline."""
  recovered = [
    of('recovered', f'even/{method}')(rows)
    for method in ('s2a', 'keep_original', 'instructed')
  ]
  steps = zip(recovered, [*recovered[1:], 0.0], strict=True)
  return min(more - less for more, less in steps)


def behind(condition: str) -> Figure:
  """Accuracy of S2A less that of the gate."""
  gate = of('accuracy', 'gate', condition, more=' keep=1')
  return of('accuracy', 'rewriter/s2a', condition) - gate


def varies(condition: str) -> Figure:
  """The gate's largest less its smallest accuracy over distractors."""
  by_count = [of('accuracy', 'gate', condition, n, ' keep=1') for n in COUNTS]
  return largest(by_count) - least(by_count)


CONDITIONS = ('none', 'suggest_wrong')
# Accuracy that a wrong suggestion costs.
GAP = of('accuracy', 'even/oracle') - of('accuracy', 'even/baseline')
KEPT = of('recovered', 'even/keep_original')
COST = of('flops', 'gate') / of('flops', 'rewriter/baseline')
VARIES = largest(map(varies, CONDITIONS))
INVENTED = of('invented', 'rewriter/s2a')
# Accuracy at 1 distractor, less that at 256.
SOFT = [of('accuracy', 'rewriter/baseline', 'none', n) for n in COUNTS]
LONG_GATE = of('accuracy', 'gate', n=256, more=' long')
LONG_WINDOW = of('accuracy', 'window/baseline', n=256, more=' long')
QUICK = {
  'the gate answers against a wrong suggestion': of('accuracy', 'gate') >= 0.9,
}
CLAIMS = {
  'a wrong suggestion costs the plain model, against the oracle': GAP >= 0.15,
  'share of that gap that S2A recovers': of('recovered', 'even/s2a') >= 0.8,
  'share that KeepOrig recovers, at least': KEPT >= 0.3,
  'share that KeepOrig recovers, at most': KEPT <= 0.75,
  'least step of S2A > KeepOrig > Instructed > baseline': least_step >= 0.01,
  'the gate is behind S2A by': largest(map(behind, CONDITIONS)) <= 0.02,
  'FLOPs of the gate over those of the plain model': COST <= 1.1,
  'accuracy of the gate varies, 1 to 256 distractors, by': VARIES <= 0.02,
  'soft attention loses, 1 to 256 distractors': SOFT[0] - SOFT[-1] >= 0.05,
  'rewritten contexts with invented units': INVENTED <= 0.02,
  'accuracy at 65,536 tokens, gate and windows': LONG_GATE >= 0.95,
  'the same, windows alone (chance: 0.031)': LONG_WINDOW <= 0.08,
}


STUDY = Study(
  name='s2a',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  quick=QUICK,
  show=show,
)

if __name__ == '__main__':
  main(STUDY)
