"""Findings of an analysis: its numbers in words."""

import textwrap
from collections.abc import Iterable
from typing import Any

from longctx.analysis.analyzer import FOUND, KINDS
from longctx.analysis.markup import number

# Smaller changes of the accuracy are not called one.
CHANGE = 0.01
# Sun et al. (arXiv:2402.17762) call a larger ratio to the median massive.
MASSIVE = 1000

NAMES = {
  'induction': 'induction head',
  'previous_token': 'previous-token head',
  'sink': 'attention sink',
}


def findings(
  numbers: dict[str, Any], change: dict[str, Any] | None
) -> list[str]:
  """A sentence or two about each thing that was looked for.

  Args:
    numbers: of analysis.json.
    change: `phase_change` of results.json; None where there was none.
  """
  scores, ablation = numbers['scores'], numbers['ablation']
  said = [_of_kind(kind, scores, ablation) for kind in KINDS]
  said.append(_missed_most(ablation))
  said.append(_massive(scores))
  if scores.get('icl_score') is not None:
    score = scores['icl_score']
    said.append(
      f'In-context learning: a scored token costs {number(abs(score))} nats '
      f'{"less" if score < 0 else "more"} at 98% of the length than at 10%.'
    )
  if change:
    said.append(
      f'Accuracy went from {number(change["before"])} to '
      f'{number(change["after"])}, halfway at step {change["step"]:,} (between '
      f'{change["low"]:,} and {change["high"]:,}) and most of the way within '
      f'{change["width"]:,.0f} steps.'
    )
  layers = numbers['layers']
  recurrent = [i for i, layer in enumerate(layers) if layer['is_recurrence']]
  if recurrent:
    said.append(
      f'{_listed("Layer", recurrent)} '
      f'{"are recurrences" if len(recurrent) > 1 else "is a recurrence"}: '
      'attention is there what its output amounts to (effective attention), '
      'which may be negative and need not sum to one. Hold the scores of its '
      'heads against their attention mass.'
    )
  for index, layer in enumerate(layers):
    if layer['lacks']:
      said.append(
        f'Layer {index}, {layer["name"]}, has no such scores: {layer["lacks"]}.'
      )
  return [sentence for sentence in said if sentence]


def summary(numbers: dict[str, Any], change: dict[str, Any] | None) -> str:
  """The findings for a terminal: what was measured, and a line or two each."""
  task, ablation = numbers['task'], numbers['ablation']
  head = (
    f'{numbers["run"] or task["name"]}: {numbers["rows"]} {numbers["split"]} '
    f'rows of {task["seq_len"]:,} tokens, step {numbers["step"]:,}, accuracy '
    f'{number(ablation["accuracy"])}, loss {number(ablation["loss"])}'
  )
  lines = [textwrap.fill(head, 80)]
  for sentence in findings(numbers, change):
    indents = {'initial_indent': '- ', 'subsequent_indent': '  '}
    lines.append(textwrap.fill(sentence, 80, **indents))
  return '\n'.join(lines)


def heads_listed(heads: Iterable[Iterable[int]]) -> str:
  """'1.0–1.3, 2.1' of [layer, head]s, in order."""
  runs: list[list[list[int]]] = []
  for layer, head in heads:
    if runs and runs[-1][-1] == [layer, head - 1]:
      runs[-1].append([layer, head])
    else:
      runs.append([[layer, head]])
  name = lambda at: f'{at[0]}.{at[1]}'
  return ', '.join(
    name(run[0]) if len(run) == 1 else f'{name(run[0])}–{name(run[-1])}'
    for run in runs
  )


def by_head(scores: list[Any]) -> list[tuple[float, int, int]]:
  """(value, layer, head) wherever a score of heads has a value."""
  return [
    (value, layer, head)
    for layer, values in enumerate(scores)
    for head, value in enumerate(values or [])
    if value is not None
  ]


def _of_kind(
  kind: str, scores: dict[str, Any], ablation: dict[str, Any]
) -> str:
  name, score = NAMES[kind], KINDS[kind]
  values, called = by_head(scores.get(score, [])), score.replace('_', ' ')
  if not values:
    return ''
  best, layer, head = max(values)
  if kind not in ablation:
    return (
      f'No {name}: the largest {called} is {number(best)}, of head '
      f'{layer}.{head}, and {FOUND} of all it reads makes one.'
    )
  found, before = ablation[kind], ablation['accuracy']
  many = len(found['heads']) > 1
  listed = heads_listed(found['heads'])
  least = min(scores[score][layer][head] for layer, head in found['heads'])
  reach = f'{called} {number(best)}'
  if many:
    reach = f'{called} {number(least)} to {number(best)}'
  start = f'Heads {listed} are {name}s' if many else f'Head {listed}: {name}'
  them, their = ('them', 'their') if many else ('it', 'its')
  return (
    f'{start} ({reach}). Without {them} accuracy '
    f'{_moves(before, found["accuracy"])}; with {their} mean output in place, '
    f'{number(found["mean_accuracy"])}.'
  )


def _moves(before: float, after: float) -> str:
  if abs(after - before) < CHANGE:
    return f'stays at {number(after)}'
  verb = 'falls' if after < before else 'rises'
  return f'{verb} from {number(before)} to {number(after)}'


def _missed_most(ablation: dict[str, Any]) -> str:
  before = ablation['accuracy']
  values = by_head(ablation['each'])
  if not values:
    return ''
  least, layer, head = min(values)
  if before - least < CHANGE:
    return (
      'No head matters on its own: without any one of them accuracy is at '
      f'least {number(least)}, with all of them {number(before)}.'
    )
  return (
    f'The head that is missed most is {layer}.{head}: without it alone '
    f'accuracy {_moves(before, least)}.'
  )


def _massive(scores: dict[str, Any]) -> str:
  values = [value or 0 for value in scores.get('massive', [])]
  if not values:
    return ''
  top = max(values)
  layer = values.index(top)
  verdict = (
    'massive' if top > MASSIVE else f'not massive ({MASSIVE:,} would be)'
  )
  return (
    f'The largest activation is {number(top)} times the median one, before '
    f'layer {layer}: {verdict}.'
  )


def _listed(name: str, indices: list[int]) -> str:
  many = 's' if len(indices) > 1 else ''
  return f'{name}{many} {", ".join(map(str, indices))}'
