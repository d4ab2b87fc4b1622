"""Induction heads: two layers learn to copy, suddenly, and one does not.

    python -m studies.induction.run
    python -m studies.induction.run --quick

Trains configs/induction.py, attention-only models on a repeated permutation,
with one layer, two, and one behind a short convolution; then the same circuit
is looked for in layers of other kinds. One to two minutes each on one CPU core.
--quick trains the first three from one seed.
"""

import json

from longctx.training import metrics
from longctx.training.phase import jump_within
from studies.common import Claim, Job, Study, main
from studies.induction.plot import show

# Name -> layers, and changes of configs/induction.py.
MODELS = {
  'two layers': (('full', 'full'), {}),
  'one layer': (('full',), {}),
  'one layer, convolution': (('full',), {'model.short_conv': 4}),
}
# Scored from the first token on, as text is.
SCORED = {
  'two layers, all scored': ('full', 'full'),
  'one layer, all scored': ('full',),
}
# Elsewhere: is there a head that matches prefixes, and what finds it?
OTHERS = {
  'linear, convolution': ('linear', 'linear'),
  'deltanet, convolution': ('deltanet', 'deltanet'),
  'window, full': ('sliding_window(window=4)', 'full'),
}


def jobs(seed: int, quick: bool) -> list[Job]:
  found = [
    _job(name, layers, seed, changes)
    for name, (layers, changes) in MODELS.items()
  ]
  for name, layers in SCORED.items():
    found.append(_job(name, layers, seed, {'task.score_first': True}))
  if quick:
    return found
  for name, layers in OTHERS.items():
    changes = {'model.short_conv': 4} if 'convolution' in name else {}
    found.append(_job(name, layers, seed, changes))
  return found


def _job(name, layers, seed, changes) -> Job:
  return Job(
    run=name.replace(', ', '-').replace(' ', '_'),
    seed=seed,
    config='configs/induction.py',
    overrides={'model.layers': str(tuple(layers)), 'eval.every': 25, **changes},
    then=(('-m', 'studies.induction.measure', '--workdir={workdir}'),),
  )


def measure(job, workdir) -> dict:
  results = json.loads((workdir / 'results.json').read_text())
  found = json.loads((workdir / 'measured.json').read_text())
  curve = [
    (row['step'], row['accuracy'])
    for row in metrics.read_lines(workdir / 'metrics.jsonl')
    if row['split'] == 'validation'
  ]
  keys = ('prefix_matching', 'previous_token', 'ablation')
  return {
    'accuracy': results['accuracy'],
    'phase_change': results.get('phase_change'),
    'curve': curve,
    # Where the first period is not scored, its loss says nothing.
    'icl_score': found['icl_score'] if 'all_scored' in job.run else None,
    **{key: found[key] for key in keys},
  }


def best(row, score: str) -> float:
  """The largest score of any head."""
  return max(value for layer in row[score] for value in layer or [0.0])


def by_600(row) -> float:
  """Accuracy at the last validation up to step 600."""
  return [accuracy for step, accuracy in row['curve'] if step <= 600][-1]


def jump(row) -> float:
  """The largest rise in accuracy within 100 steps."""
  steps, accuracies = zip(*row['curve'], strict=True)
  return jump_within(steps, accuracies, 100)


def without_found(row) -> float | None:
  """Accuracy without the heads whose prefix matching is above 0.3."""
  return row['ablation'].get('induction', {}).get('accuracy', 1.0)


CLAIMS = (
  Claim(
    text='two layers: accuracy on repeats by step 600',
    figure=lambda rows: by_600(rows['two_layers']),
    at_least=0.99,
    quick=True,
  ),
  Claim(
    text='two layers: prefix matching of the best head',
    figure=lambda rows: best(rows['two_layers'], 'prefix_matching'),
    at_least=0.6,
    quick=True,
  ),
  Claim(
    text='two layers: largest rise in accuracy within 100 steps',
    figure=lambda rows: jump(rows['two_layers']),
    at_least=0.5,
    quick=True,
  ),
  Claim(
    text='two layers: accuracy without the induction heads found',
    figure=lambda rows: without_found(rows['two_layers']),
    at_most=0.2,
    quick=True,
  ),
  Claim(
    text='one layer: accuracy',
    figure=lambda rows: rows['one_layer']['accuracy'],
    at_most=0.15,
    quick=True,
  ),
  Claim(
    text='one layer behind a short convolution: accuracy',
    figure=lambda rows: rows['one_layer-convolution']['accuracy'],
    at_least=0.99,
    quick=True,
  ),
  Claim(
    text='one layer, all scored: in-context-learning score, without a copy',
    figure=lambda rows: rows['one_layer-all_scored']['icl_score'],
    at_most=-0.5,
    quick=True,
  ),
  Claim(
    text='one layer, all scored: accuracy',
    figure=lambda rows: rows['one_layer-all_scored']['accuracy'],
    at_most=0.15,
    quick=True,
  ),
)

STUDY = Study(
  name='induction',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  show=show,
)

if __name__ == '__main__':
  main(STUDY)
