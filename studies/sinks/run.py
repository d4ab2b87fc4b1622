"""Attention sinks: who leans on BOS, who need not, and what BOS is worth.

    python -m studies.sinks.run
    python -m studies.sinks.run --quick

Trains configs/sinks.py with six ways to normalize attention, and with RoPE in
place of learned positions, a minute each on one CPU core. --quick trains
softmax, sigmoid and the output gate from one seed.
"""

import json

import numpy as np

from studies.common import Claim, Job, Study, main
from studies.sinks.plot import show

VARIANTS = (
  'full',
  'output_gate',
  'sigmoid',
  'softmax1',
  'sink_logits',
  'softpick',
)
QUICK = VARIANTS[:3]


def jobs(seed: int, quick: bool) -> list[Job]:
  then = (('-m', 'studies.sinks.measure', '--workdir={workdir}'),)
  found = [
    Job(run=name, seed=seed, config=f'configs/sinks.py:{name}', then=then)
    for name in (QUICK if quick else VARIANTS)
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
  results = json.loads((workdir / 'results.json').read_text())
  measured = json.loads((workdir / 'measured.json').read_text())
  return {'accuracy': results['accuracy'], **measured}


def share(row) -> float:
  """Of all its attention, what goes to BOS."""
  return row['first_token'] / row['mass']


def largest_gap(rows) -> float:
  """Nats between the losses of the three and softmax's."""
  losses = [rows[name]['loss'] for name in QUICK]
  return max(abs(loss - losses[0]) for loss in losses)


def damage(row) -> float:
  """Nats per token that go with BOS."""
  return row['evicted_loss'] - row['loss']


def explained(rows) -> float:
  """R² of the damage in a line of the attention to BOS, over normalizers.

  Negative where the line falls.
  """
  normalizers = [rows[name] for name in VARIANTS]
  mass = np.array([row['first_token'] for row in normalizers])
  lost = np.array([damage(row) for row in normalizers])
  r = float(np.corrcoef(mass, lost)[0, 1])
  return r * abs(r)


CLAIMS = (
  Claim(
    text='softmax: share of rows whose first token is a sink (Sink_1, ε = 0.3)',
    figure=lambda rows: rows['full']['sink_rate'],
    at_least=0.9,
    quick=True,
  ),
  Claim(
    text='softmax: attention to BOS at rest, over that at triggers',
    figure=lambda rows: rows['full']['dormant'] / rows['full']['active'],
    at_least=8,
    quick=True,
  ),
  Claim(
    text='sigmoid: sink rate',
    figure=lambda rows: rows['sigmoid']['sink_rate'],
    at_most=0.02,
    quick=True,
  ),
  Claim(
    text='sigmoid: share of its attention that BOS gets',
    figure=lambda rows: share(rows['sigmoid']),
    at_most=0.1,
    quick=True,
  ),
  Claim(
    text='output gate: attention to BOS above that of sigmoid',
    figure=lambda rows: (
      rows['output_gate']['first_token'] - rows['sigmoid']['first_token']
    ),
    at_least=0.1,
    quick=True,
  ),
  Claim(
    text='output gate: attention to BOS below that of softmax',
    figure=lambda rows: (
      rows['full']['first_token'] - rows['output_gate']['first_token']
    ),
    at_least=0.1,
    quick=True,
  ),
  Claim(
    text='the three learn alike: largest difference in loss, nats',
    figure=largest_gap,
    at_most=0.005,
    quick=True,
  ),
  Claim(
    text='R² of the loss without BOS in the attention to it, over normalizers',
    figure=explained,
    at_least=0.5,
  ),
)

STUDY = Study(
  name='sinks',
  doc=__doc__,
  jobs=jobs,
  measure=measure,
  claims=CLAIMS,
  show=show,
)

if __name__ == '__main__':
  main(STUDY)
