"""Induction heads: two layers learn to copy, suddenly, and one does not.

    python -m studies.induction.run
    python -m studies.induction.run --quick

Trains configs/induction.py, attention-only models on a repeated permutation,
with one layer, two, and one behind a short convolution; then the same circuit
is looked for in layers of other kinds. One to two minutes each on one CPU core.
--quick trains the first three from one seed.
"""

from longctx.training import log_files
from longctx.training.phase import jump_within
from studies.claims import of, of_run
from studies.common import Job, Study, main, read
from studies.induction import plot
from studies.induction.plot import best

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
  results, found = read(workdir), read(workdir, 'measured.json')
  curve = [
    (row['step'], row['accuracy'])
    for row in log_files.read_lines(workdir / 'metrics.jsonl')
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


accuracy, icl_score = of('accuracy'), of('icl_score')
matching = of_run(lambda row: best(row, 'prefix_matching'))


@of_run
def by_600(row) -> float:
  """Accuracy at the last validation up to step 600."""
  return [accuracy for step, accuracy in row['curve'] if step <= 600][-1]


@of_run
def jump(row) -> float:
  """The largest rise in accuracy within 100 steps."""
  steps, accuracies = zip(*row['curve'], strict=True)
  return jump_within(steps, accuracies, 100)


@of_run
def ablated(row) -> float:
  """Accuracy without the heads whose prefix matching is above 0.3."""
  return row['ablation'].get('induction', {}).get('accuracy', 1.0)


QUICK = {
  'two layers: accuracy on repeats by step 600': by_600('two_layers') >= 0.99,
  'two layers: best prefix matching of a head': matching('two_layers') >= 0.6,
  'two layers: largest rise within 100 steps': jump('two_layers') >= 0.5,
  'two layers, without their induction heads': ablated('two_layers') <= 0.2,
  'one layer: accuracy': accuracy('one_layer') <= 0.15,
  'one layer, convolution: accuracy': accuracy('one_layer-convolution') >= 0.99,
  'one layer, all scored: ICL score': icl_score('one_layer-all_scored') <= -0.5,
  'one layer, all scored: accuracy': accuracy('one_layer-all_scored') <= 0.15,
}

STUDY = Study(
  name='induction',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  quick=QUICK,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
