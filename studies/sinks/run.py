"""Attention sinks: who leans on BOS, who need not, and what BOS is worth.

    python -m studies.sinks.run
    python -m studies.sinks.run --quick

Trains configs/sinks.py with six ways to normalize attention, and with RoPE in
place of learned positions, a minute each on one CPU core. --quick trains
softmax, sigmoid and the output gate from one seed.
"""

import numpy as np

from studies.claims import Figure, of, of_run
from studies.common import Job, Study, main, read
from studies.sinks import plot

VARIANTS = (
  'full',
  'output_gate',
  'sigmoid',
  'softmax1',
  'sink_logits',
  'softpick',
)
QUICK_VARIANTS = VARIANTS[:3]


def jobs(seed: int, quick: bool) -> list[Job]:
  then = (('-m', 'studies.sinks.measure', '--workdir={workdir}'),)
  found = [
    Job(run=name, seed=seed, config=f'configs/sinks.py:{name}', then=then)
    for name in (QUICK_VARIANTS if quick else VARIANTS)
  ]
  if not quick:
    found.append(
      Job(
        run='full_rope',
        seed=seed,
        config='configs/sinks.py:full',
        overrides={'model.position_encoding': 'rope'},
        then=then,
      )
    )
  return found


def measure(job, workdir) -> dict:
  measured = read(workdir, 'measured.json')
  return {'accuracy': read(workdir)['accuracy'], **measured}


sink_rate, bos = of('sink_rate'), of('first_token')
at_rest = of_run(lambda row: row['dormant'] / row['active'])
share = of_run(lambda row: row['first_token'] / row['mass'])
GATE = bos('output_gate')


@Figure
def largest_gap(rows) -> float:
  """Nats between the losses of the three and softmax's."""
  losses = [rows[name]['loss'] for name in QUICK_VARIANTS]
  return max(abs(loss - losses[0]) for loss in losses)


@Figure
def explained(rows) -> float:
  """R² of the nats that go with BOS in a line of the attention to it.

  Over normalizers; negative where the line falls.
  """
  normalizers = [rows[name] for name in VARIANTS]
  mass = np.array([row['first_token'] for row in normalizers])
  lost = np.array([row['evicted_loss'] - row['loss'] for row in normalizers])
  r = float(np.corrcoef(mass, lost)[0, 1])
  return r * abs(r)


QUICK = {
  'softmax: rows with a sink (Sink_1, ε = 0.3)': sink_rate('full') >= 0.9,
  'softmax: attention to BOS at rest over triggers': at_rest('full') >= 8,
  'sigmoid: sink rate': sink_rate('sigmoid') <= 0.02,
  'sigmoid: share of its attention that BOS gets': share('sigmoid') <= 0.1,
  'output gate: attention to BOS above sigmoid': GATE - bos('sigmoid') >= 0.1,
  'output gate: attention to BOS below softmax': bos('full') - GATE >= 0.1,
  'the three learn alike: most nats between losses': largest_gap <= 0.005,
}
CLAIMS = {
  'R² of the loss without BOS in the attention to it': explained >= 0.5,
}

STUDY = Study(
  name='sinks',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  quick=QUICK,
  show=plot.show,
)

if __name__ == '__main__':
  main(STUDY)
