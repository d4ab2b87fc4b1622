"""HTML report of an analysis: scores and attention maps in one file."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from longctx.analysis import markup
from longctx.analysis.analyzer import FOUND, KINDS
from longctx.analysis.findings import by_head, findings, heads_listed
from longctx.analysis.glossary import NORMS, SCORES, SHARES


def report(
  numbers: dict[str, Any],
  maps: list[np.ndarray | None],
  *,
  rows: list[dict[str, Any]],
  results: dict[str, Any],
) -> str:
  """A page.

  Args:
    numbers: of analysis.json, see `longctx.analysis.__main__`.
    maps: per layer [rows, heads, M, M], see `maps.pooled_maps`.
    rows: the lines of metrics.jsonl.
    results: of results.json; {} for an unfinished run.
  """
  title = f'{numbers["run"] or numbers["task"]["name"]}: what its heads do'
  body = [f'<h1>{markup.escape(title)}</h1>']
  body += _head(numbers, results)
  body.append('<h2>Scores of heads</h2>')
  body.append(
    markup.note(
      f'Means over {numbers["rows"]} rows. A row of a table is a layer and a '
      'column one of its heads; – where a layer has no such score. The exact '
      'number shows under the pointer.'
    )
  )
  body.append(f'<div class="side">{"".join(_scores(numbers))}</div>')
  body += _maps(numbers, maps)
  body += _tokens(numbers)
  body += _ablation(numbers)
  body += _timeline(rows, results.get('phase_change'))
  return markup.page(title, body)


def _head(numbers: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
  task = dict(numbers['task'])
  name = task.pop('name')
  fields = ', '.join(f'{key}={value}' for key, value in task.items())
  ablation = numbers['ablation']
  here = ', '.join(
    f'{key} {markup.number(ablation[key])}' for key in ('accuracy', 'loss')
  )
  test = ', '.join(
    f'{key} {markup.number(results.get(key))}'
    for key in ('accuracy', 'loss', 'chance', 'ceiling')
  )
  versions = numbers['versions']
  packages = ('python', 'longctx', 'jax', 'flax', 'device')
  facts = {
    'task': f'{name}({fields})',
    'layers': ', '.join(layer['name'] for layer in numbers['layers']),
    'parameters': f'{numbers["parameters"]:,}',
    'step': f'{numbers["step"]:,}',
    f'on {numbers["rows"]} {numbers["split"]} rows': here,
    'on the test split, at the end of training': test,
    'trained at': numbers['trained_commit'] or '–',
    'analysed at': versions.get('commit') or '–',
    'with': ', '.join(f'{key} {versions.get(key)}' for key in packages),
    'command': numbers['command'],
  }
  yield markup.facts(facts)
  yield '<h2>In words</h2>'
  said = findings(numbers, results.get('phase_change'))
  yield '<ul>' + ''.join(f'<li>{markup.escape(x)}</li>' for x in said) + '</ul>'


def _names(numbers: dict[str, Any]) -> list[str]:
  """'0 full' and so on, arguments left out."""
  return [
    f'{index} {layer["name"].partition("(")[0]}'
    for index, layer in enumerate(numbers['layers'])
  ]


def _by_layer(
  numbers: dict[str, Any], rows: list[Any], top: float | None
) -> str:
  rows = [row or [] for row in rows]
  columns = [str(head) for head in range(max(map(len, rows), default=0))]
  return markup.table(rows, names=_names(numbers), columns=columns, top=top)


def _scores(numbers: dict[str, Any]) -> Iterator[str]:
  for name, about in SCORES.items():
    rows = numbers['scores'].get(name, [])
    values = by_head(rows)
    if not values:
      continue
    top = 1.0 if name in SHARES else max(abs(value) for value, *_ in values)
    title = name.removesuffix('_by_head').replace('_', ' ')
    yield markup.box(title, about, _by_layer(numbers, rows, top))


def _maps(
  numbers: dict[str, Any], maps: list[np.ndarray | None]
) -> Iterator[str]:
  yield '<h2>Attention maps</h2>'
  yield markup.note(
    'Axes are positions in the row. Each pixel is the mean over a block of '
    'pairs, of the first row (left) and of all rows (right); shades are square '
    'roots, from zero to the largest value, which stands below. A column at '
    'the left edge is a sink, a stripe beside the diagonal a previous-token '
    'head. Effective attention has signs: red is positive and blue negative.'
  )
  seq_len = numbers['task']['seq_len']
  for index, (name, of_layer) in enumerate(
    zip(_names(numbers), maps, strict=True)
  ):
    yield f'<h3>{markup.escape(name)}</h3>'
    if of_layer is None:
      yield markup.note(f'No map: {numbers["layers"][index]["lacks"]}.')
      continue
    for head in range(of_layer.shape[1]):
      name = f'head {index}.{head}'
      one, mean = of_layer[0, head], of_layer[:, head].mean(0)
      tops = [markup.number(float(np.abs(y).max())) for y in (one, mean)]
      yield (
        '<figure>'
        + markup.picture(one, f'{name}, first row', seq_len=seq_len)
        + markup.picture(mean, f'{name}, mean of the rows', seq_len=seq_len)
        + f'<figcaption>{name}: largest {" and ".join(tops)}</figcaption>'
        '</figure>'
      )


def _tokens(numbers: dict[str, Any]) -> Iterator[str]:
  """Where attention lies in a row, and what that is good for."""
  scores = numbers['scores']
  yield '<h2>Along the row</h2><div class="side">'
  about = {
    'mass_by_bucket': 'Attention to each eighth of the row, of all queries.',
    'first_tokens': (
      'Attention to the first four tokens, α₁ to α₄, of the queries that can '
      'read them (arXiv:2410.10781).'
    ),
  }
  for name, text in about.items():
    heads = {
      f'{layer}.{head}': values
      for layer, of_layer in enumerate(scores.get(name, []))
      for head, values in enumerate(of_layer or [])
    }
    if not heads:
      continue
    width = max(map(len, heads.values()))
    content = markup.table(
      list(heads.values()),
      names=list(heads),
      columns=[str(place) for place in range(1, width + 1)],
      top=1.0,
    )
    yield markup.box(name.replace('_', ' '), text, content)
  losses = scores['loss_by_position']
  parts = [(place + 0.5) / len(losses) for place in range(len(losses))]
  yield markup.box(
    'loss by position',
    'Of scored tokens; a gap where none are. In-context learning score: '
    f'{markup.number(scores["icl_score"])} nats (arXiv:2209.11895).',
    markup.chart(
      {'loss': (parts, losses)}, x='place in the row', y='nats per token'
    ),
  )
  yield markup.box(
    'residual stream',
    'Mean length of its vectors before each layer, and massive activations, '
    'where the ratio is above 1,000 (arXiv:2402.17762).',
    markup.table(
      list(zip(*(scores[name] for name in NORMS), strict=True)),
      names=_names(numbers),
      columns=list(NORMS.values()),
    ),
  )
  yield '</div>'


def _ablation(numbers: dict[str, Any]) -> Iterator[str]:
  ablation = numbers['ablation']
  yield '<h2>Without heads</h2><div class="side">'
  keys = ('accuracy', 'loss', 'mean_accuracy', 'mean_loss')
  rows = [['–', ablation['accuracy'], ablation['loss'], None, None]]
  names = ['all heads']
  for kind in KINDS:
    if kind in ablation:
      found = ablation[kind]
      rows.append([heads_listed(found['heads']), *(found[k] for k in keys)])
      names.append(f'without {kind.replace("_", " ")}')
  yield markup.box(
    'kinds of heads',
    f'Heads whose score is above {FOUND}, silent together, or saying their '
    'mean in place of zero.',
    markup.table(
      rows,
      names=names,
      columns=['heads', *(key.replace('_', ' ') for key in keys)],
    ),
  )
  yield markup.box(
    'accuracy without each head',
    f'One head silent at a time; with all of them it is '
    f'{markup.number(ablation["accuracy"])}.',
    _by_layer(numbers, ablation['each'], 1.0),
  )
  yield '</div>'


def _timeline(
  rows: list[dict[str, Any]], change: dict[str, Any] | None
) -> Iterator[str]:
  yield '<h2>Training</h2><div class="side">'
  band = (change['low'], change['high']) if change else None
  of = lambda split: [row for row in rows if row['split'] == split]
  for key, y in (('accuracy', 'accuracy'), ('loss', 'nats per scored token')):
    series = {
      split: ([r['step'] for r in of(split)], [r.get(key) for r in of(split)])
      for split in ('validation', 'train')
    }
    about = 'The phase change is shaded.' if change else 'Over steps.'
    yield markup.box(key, about, markup.chart(series, x='step', y=y, band=band))
  if measured := of('analysis'):
    steps = [row['step'] for row in measured]
    best = lambda row, name: max(
      (value for value, *_ in by_head(row.get(name) or [])), default=None
    )
    series = {
      name.replace('_', ' '): (steps, [best(row, name) for row in measured])
      for name in ('prefix_matching', 'previous_token')
    }
    series['sink rate'] = (steps, [row.get('sink_rate') for row in measured])
    yield markup.box(
      'scores over steps',
      'Of the head that has most; the sink rate of all heads.',
      markup.chart(series, x='step', y='score', band=band),
    )
    icl = [row.get('icl_score') for row in measured]
    yield markup.box(
      'in-context learning over steps',
      'Loss late in the row less the loss early in it.',
      markup.chart({'icl': (steps, icl)}, x='step', y='nats', band=band),
    )
  if ablated := of('ablation'):
    without = lambda row, kind: (row.get(kind) or {}).get('accuracy')
    yield markup.box(
      'accuracy without heads over steps',
      f'Of each kind together; – where no head scores above {FOUND}.',
      markup.table(
        [
          [row['accuracy'], *(without(row, kind) for kind in KINDS)]
          for row in ablated
        ],
        names=[f'{row["step"]:,}' for row in ablated],
        columns=['all heads', *(kind.replace('_', ' ') for kind in KINDS)],
        top=1.0,
      ),
    )
  yield '</div>'
