"""Glossary of scores, a line each, for who sees their numbers."""

from longctx.analysis.analyzer import FOUND

# Name of a score of heads -> what it is, and where it comes from.
SCORES = {
  'prefix_matching': (
    'Attention to tokens behind an earlier occurrence of the present one, on '
    'random symbols that repeat: induction heads (arXiv:2209.11895).'
  ),
  'previous_token': (
    'Attention to the token before, on the same: what induction heads read '
    '(arXiv:2209.11895).'
  ),
  'duplicate_token': (
    'Attention to earlier occurrences of the token itself, on the same '
    '(arXiv:2211.00593).'
  ),
  'copying': (
    'Whether the head alone raises the logits of what it reads, from -1 to 1, '
    'where no other symbol is raised more, on the same (arXiv:2209.11895).'
  ),
  'first_token': 'Attention to the first token: sinks (arXiv:2309.17453).',
  'sink_rate_by_head': (
    f'Share of rows in which the first token gets more than {FOUND} of an '
    'average query: Sink_1 (arXiv:2410.10781).'
  ),
  'entropy': 'Of the weights of a query, in nats; layers of softmax alone.',
  'span': 'How many keys a query reads, if it reads them alike; an estimate.',
  'distance': 'How many tokens back attention lies on average.',
  'mass': 'What attention sums to: 1 for softmax, anything for recurrences.',
  'max_logit': 'The largest logit in any row; layers of softmax alone.',
  'key_norm': 'Mean length of a key, by key head.',
  'first_key_norm': 'Length of the first key: small at a sink.',
  'value_norm': 'Mean length of a value, by key head.',
  'first_value_norm': (
    'Length of the first value: small at a sink (arXiv:2410.13835).'
  ),
}
# Scores of at most one.
SHARES = {
  *('prefix_matching', 'previous_token', 'duplicate_token', 'copying'),
  *('first_token', 'sink_rate_by_head'),
}
# Name of a size of the residual stream -> what it is.
NORMS = {
  'hidden_norm': 'mean token',
  'first_hidden_norm': 'first token',
  'massive': 'largest activation / median',
}
