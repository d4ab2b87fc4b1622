"""System 2 Attention: rewriting, and a hard gate, against opinions.

    python -m studies.s2a.run
    python -m studies.s2a.run --quick

Trains the runs of configs/s2a.py and asks them questions of the test split:
every method in every condition, more distractors than in training, a crowd of
opinions, and contexts of 65,536 tokens.
"""

from longctx.training import metrics
from studies.common import Claim, Job, Study, main
from studies.s2a.plot import show

DISTRACTORS = (1, 4, 16, 64, 256)
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
  counts = ','.join(map(str, DISTRACTORS))
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
  for row in metrics.read_lines(workdir / 's2a.jsonl'):
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
):
  return lambda rows: rows[f'{who} {condition} {n}{more}'].get(key)


def gap(rows) -> float:
  """Accuracy that a wrong suggestion costs."""
  accuracy = lambda method: of('accuracy', f'even/{method}')(rows)
  return accuracy('oracle') - accuracy('baseline')


def least_step(rows) -> float:
  """The smallest difference along S2A > KeepOrig > Instructed > baseline."""
  recovered = [
    of('recovered', f'even/{method}')(rows)
    for method in ('s2a', 'keep_original', 'instructed')
  ]
  steps = zip(recovered, [*recovered[1:], 0.0], strict=True)
  return min(more - less for more, less in steps)


def ratio(rows) -> float:
  """FLOPs of an answer through the gate, over those of the plain model."""
  return of('flops', 'gate')(rows) / of('flops', 'rewriter/baseline')(rows)


def behind(rows) -> float:
  """Accuracy of S2A less that of the gate, the larger of two conditions."""
  return max(
    of('accuracy', 'rewriter/s2a', condition)(rows)
    - of('accuracy', 'gate', condition, more=' keep=1')(rows)
    for condition in ('none', 'suggest_wrong')
  )


def spread(rows) -> float:
  """The gate's largest less its smallest accuracy, the worse condition."""
  worst = 0.0
  for condition in ('none', 'suggest_wrong'):
    found = [
      of('accuracy', 'gate', condition, n, ' keep=1')(rows) for n in DISTRACTORS
    ]
    worst = max(worst, max(found) - min(found))
  return worst


def decay(rows) -> float:
  """Accuracy without opinions at 1 distractor, less that at 256."""
  accuracy = lambda n: of('accuracy', 'rewriter/baseline', 'none', n)(rows)
  return accuracy(DISTRACTORS[0]) - accuracy(DISTRACTORS[-1])


def at_length(who: str):
  return lambda rows: rows[f'{who} suggest_wrong 256 long']['accuracy']


CLAIMS = (
  Claim(
    text='a wrong suggestion costs the plain model, against the oracle',
    figure=gap,
    at_least=0.15,
  ),
  Claim(
    text='share of that gap that S2A recovers',
    figure=of('recovered', 'even/s2a'),
    at_least=0.8,
  ),
  Claim(
    text='share that KeepOrig recovers, at least',
    figure=of('recovered', 'even/keep_original'),
    at_least=0.3,
  ),
  Claim(
    text='share that KeepOrig recovers, at most',
    figure=of('recovered', 'even/keep_original'),
    at_most=0.75,
  ),
  Claim(
    text='smallest step of S2A > KeepOrig > Instructed > baseline',
    figure=least_step,
    at_least=0.01,
  ),
  Claim(
    text='the gate is behind S2A by',
    figure=behind,
    at_most=0.02,
  ),
  Claim(
    text='FLOPs of the gate over those of the plain model',
    figure=ratio,
    at_most=1.1,
  ),
  Claim(
    text='accuracy of the gate varies from 1 to 256 distractors by',
    figure=spread,
    at_most=0.02,
  ),
  Claim(
    text='soft attention loses from 1 to 256 distractors, without opinions',
    figure=decay,
    at_least=0.05,
  ),
  Claim(
    text='invented units, share of rewritten contexts, 8 distractors',
    figure=of('invented', 'rewriter/s2a'),
    at_most=0.02,
  ),
  Claim(
    text='accuracy at 65,536 tokens, gate and windows',
    figure=at_length('gate'),
    at_least=0.95,
  ),
  Claim(
    text='accuracy at 65,536 tokens, windows alone (chance: 0.031)',
    figure=at_length('window/baseline'),
    at_most=0.08,
  ),
  Claim(
    text='the gate answers against a wrong suggestion',
    figure=of('accuracy', 'gate'),
    at_least=0.9,
    quick=True,
  ),
)


STUDY = Study(
  name='s2a', doc=__doc__, jobs=jobs, measure=measure, claims=CLAIMS, show=show
)

if __name__ == '__main__':
  main(STUDY)
