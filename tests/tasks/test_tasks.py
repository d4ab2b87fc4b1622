"""Every task: reproducible, split without overlap, solvable to its ceiling."""

import hashlib

import numpy as np
import pytest

from longctx.tasks import (
  SPLITS,
  TASKS,
  make_task,
  task_defaults,
  task_fields,
)

# A new task is tested with its defaults, without an edit here.
SYNTHETIC = [name for name in TASKS if name not in ('bytes_lm', 'text_lm')]

# The best predictor errs, or some answers are likelier than others, by chance:
# figures are expectations, met within 4 standard errors.
STOCHASTIC = ('bigram_backcopy', 'markov')

CASES = [
  *((name, {}) for name in SYNTHETIC),
  ('arithmetic', dict(seq_len=33, in_topic=False)),
  ('arithmetic', dict(num_irrelevant=0, num_steps=1, modulus=7)),
  ('arithmetic', dict(num_names=6, num_steps=6, num_irrelevant=0)),
  ('bigram_backcopy', dict(seq_len=33, vocab_size=8, concentration=1.0)),
  ('copying', dict(seq_len=11, num_symbols=3, min_length=1, max_length=5)),
  ('induction', dict(seq_len=7, vocab_size=6, min_period=1, max_period=5)),
  (
    'induction',
    dict(seq_len=9, vocab_size=7, min_period=2, max_period=6, score_first=True),
  ),
  ('markov', dict(seq_len=20, num_states=5)),
  ('mqar', dict(seq_len=33, vocab_size=18, num_pairs=8, power_a=1.0)),
  ('mqar', dict(seq_len=40, num_pairs=5, filler='zero')),
  ('mqar', dict(seq_len=32, num_pairs=8, min_pairs=3)),
  ('mqar', dict(seq_len=128, num_pairs=8, filler='zoology')),
  ('multi_needle', dict(seq_len=36, num_needles=4, num_queries=2)),
  (
    'multi_needle',
    dict(num_symbols=3, num_needles=9, num_queries=9, value_length=1),
  ),
  ('multi_needle', dict(vocab_size=46, num_queries=1, filler='repeat')),
  ('ngram_lookup', dict(key='prefix')),
  (
    'ngram_lookup',
    dict(seq_len=8, num_symbols=4, key_length=1, answer_length=2),
  ),
  (
    'ngram_lookup',
    dict(num_symbols=2, key_length=6, answer_length=1, max_length=50),
  ),
  ('passkey', dict(seq_len=12, vocab_size=14, filler='repeat')),
  ('passkey', dict(seq_len=31, num_symbols=4, key_length=1, depth=1.0)),
  ('phone_book', dict(seq_len=17, name_length=2, number_length=4)),
  ('phone_book', dict(num_letters=2, num_entries=6, name_length=3)),
  ('selective_copying', dict(seq_len=8, num_symbols=3, num_kept=4)),
  ('stream_eval', dict(seq_len=37, num_symbols=3, key_length=1, lag=3)),
  ('stream_eval', dict(num_symbols=4, facts_per_query=1, max_lag=2)),
  ('variable_tracking', dict(seq_len=30)),
  ('variable_tracking', dict(num_chains=1, num_hops=5, vocab_size=52)),
  ('variable_tracking', dict(num_chains=6, num_values=6, num_hops=0)),
]
IDS = [
  '-'.join([name, *(f'{k}={v}' for k, v in fields.items())])
  for name, fields in CASES
]
cases = pytest.mark.parametrize(('name', 'fields'), CASES, ids=IDS)


@cases
def test_oracle_that_sees_only_tokens_reaches_the_ceiling(name, fields):
  task = make_task(name, **fields)
  accuracies = []
  for index in range(100):
    example = task.get(0, 'train', index)
    asked = example.weights > 0
    answer = task.solve(example.tokens)
    accuracies.append((answer == example.labels)[asked].mean())
  noise = np.std(accuracies) / np.sqrt(len(accuracies))
  is_certain = name not in STOCHASTIC and not fields.get('score_first')
  assert (noise == 0) == is_certain
  assert abs(np.mean(accuracies) - task.ceiling) <= 4 * noise


@cases
def test_constant_answer_scores_chance(name, fields):
  task = make_task(name, **fields)
  rng = np.random.default_rng(0)
  counts = np.zeros(task.vocab_size)
  for _ in range(300):
    example = task.example(rng)
    asked = example.weights > 0
    counts += np.bincount(example.labels[asked], minlength=task.vocab_size)
  share = counts / counts.sum()
  # Answers of one example depend on each other, so the noise is that of some
  # hundred draws for each answer that an example can hold once.
  noise = 5 * np.sqrt(task.chance / 300)
  if name not in STOCHASTIC:
    assert np.count_nonzero(counts) == round(1 / task.chance)
  assert abs(share.max() - task.chance) < noise


@cases
def test_example_keeps_to_its_shapes_and_vocabulary(name, fields):
  task = make_task(name, **fields)
  for split in SPLITS:
    example = task.get(1, split, 3)
    arrays = example.arrays()
    assert set(arrays) - {'relevant'} == {'tokens', 'labels', 'weights'}
    assert {a.shape for a in arrays.values()} == {(task.seq_len,)}
    assert 0 <= example.tokens.min() <= example.tokens.max() < task.vocab_size
    assert 0 <= example.labels.min() <= example.labels.max() < task.vocab_size
    assert example.weights.sum() > 0


# Recorded digests of the first examples: equal in any process, on any supported
# Python and numpy. A change here changes every published figure.
DIGESTS = {
  'arithmetic': 'b0eea3266552cc12',
  'bigram_backcopy': '22a266f56192478d',
  'copying': '4fee879fc0c291a8',
  'induction': '6b5226db0688a844',
  'markov': '9e108cb9545ac0ab',
  'mqar': '2fd1e13d5fabad61',
  'multi_needle': '3eb86121e566d500',
  'ngram_lookup': 'b4b535fa634ff18d',
  'opinions': '806f61c5b6bdfc63',
  'passkey': '520f83b29b9860c6',
  'phone_book': 'c87715dbd52a4806',
  'selective_copying': 'cedf5420c78ccdd9',
  'variable_tracking': '05766cdb6333aaba',
}


@pytest.mark.parametrize('name', SYNTHETIC)
def test_examples_depend_on_seed_split_and_index_alone(name):
  task = make_task(name)
  addresses = [(s, p, i) for s in (0, 7) for p in SPLITS for i in (0, 1, 10**9)]
  shuffled = np.random.default_rng(0).permutation(len(addresses))
  found = {
    addresses[a]: task.get(*addresses[a]).tokens.tobytes() for a in shuffled
  }
  assert len(set(found.values())) == len(addresses)
  joined = b''.join(found[address] for address in addresses)
  digest = hashlib.sha256(joined).hexdigest()[:16]
  assert digest == DIGESTS.get(name, digest)


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('copying', dict(seq_len=9, num_symbols=2, min_length=4, max_length=4)),
    ('induction', dict(seq_len=5, vocab_size=6, min_period=3, max_period=3)),
    ('selective_copying', dict(seq_len=6, num_symbols=3, num_kept=2)),
    ('markov', dict(seq_len=8, num_states=2)),
    ('phone_book', dict(seq_len=7, name_length=1, number_length=1)),
  ],
)
def test_splits_share_no_example_where_few_exist(name, fields):
  task = make_task(name, **fields)
  seen = {
    split: {
      task.get(seed, split, i).tokens.tobytes()
      for seed in (0, 1)
      for i in range(100)
    }
    for split in SPLITS
  }
  assert not seen['train'] & seen['validation']
  assert not seen['train'] & seen['test']
  assert not seen['validation'] & seen['test']
  assert len(seen['train']) > len(seen['test'])


def test_split_that_cannot_exist_is_an_error():
  task = make_task('copying', seq_len=3, num_symbols=1)
  with pytest.raises(ValueError, match='too few different examples'):
    for split in SPLITS:
      task.get(0, split, 0)


@pytest.mark.parametrize(
  ('address', 'message'),
  [
    ((0, 'valid', 0), 'known: train, validation, test'),
    ((-1, 'train', 0), 'must not be negative'),
    ((0, 'train', -1), 'must not be negative'),
  ],
)
def test_bad_address_is_an_error(address, message):
  with pytest.raises(ValueError, match=message):
    make_task('mqar').get(*address)


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    (
      'mqqar',
      {},
      "unknown task 'mqqar'; did you mean mqar. known: arithmetic, bigram_",
    ),
    ('mqar', dict(num_pair=4), "'num_pair'; did you mean num_pairs. known"),
    (
      'mqar',
      dict(num_pairs='4'),
      "task.num_pairs='4' must be an integer, in .1, 16777216., such as 4",
    ),
    (
      'mqar',
      dict(num_pairs=True),
      'must be an integer, in .1, 16777216., such as 1',
    ),
    ('mqar', dict(seq_len=63), 'num_pairs=16: .* seq_len >= 64'),
    ('mqar', dict(vocab_size=33), 'vocab_size >= 34'),
    ('mqar', dict(num_pairs=0), 'at least 1'),
    ('mqar', dict(power_a=0.0), 'must be above 0'),
    ('mqar', dict(filler='dirty'), 'known: clean, zero, zoology'),
    ('arithmetic', dict(seq_len=32), 'seq_len >= 33'),
    ('arithmetic', dict(vocab_size=47), 'vocab_size >= 48'),
    ('arithmetic', dict(num_names=5), 'num_names >= 6'),
    ('arithmetic', dict(num_names=8, in_topic=False), 'num_names >= 9'),
    ('arithmetic', dict(modulus=1), 'at least 2'),
    ('arithmetic', dict(num_steps=0), 'at least 1'),
    ('arithmetic', dict(num_irrelevant=-1), 'must be at least 0'),
    ('bigram_backcopy', dict(seq_len=0), 'must be at least 1'),
    ('bigram_backcopy', dict(vocab_size=5), 'vocab_size >= 6'),
    ('bigram_backcopy', dict(num_triggers=-1), 'must be at least 0'),
    ('bigram_backcopy', dict(concentration=0.0), 'must be above 0'),
    (
      'bigram_backcopy',
      dict(concentration=1e-3, chain_seed=2),
      'raise concentration',
    ),
    ('copying', dict(seq_len=2), 'seq_len >= 3'),
    ('copying', dict(max_length=64), 'seq_len >= 129'),
    ('copying', dict(min_length=9, max_length=8), 'min_length <= max_length'),
    ('copying', dict(num_symbols=0), 'at least 1'),
    ('selective_copying', dict(seq_len=31), 'seq_len >= 32'),
    ('selective_copying', dict(num_kept=0), 'at least 1'),
    ('induction', dict(seq_len=33), 'seq_len >= 34'),
    ('induction', dict(vocab_size=32), 'vocab_size >= 33'),
    ('induction', dict(min_period=33), 'min_period <= max_period'),
    ('passkey', dict(seq_len=11), 'seq_len >= 12'),
    ('passkey', dict(vocab_size=13), 'vocab_size >= 14'),
    ('passkey', dict(key_length=11), 'num_symbols=10'),
    ('passkey', dict(depth=1.1), r'must be in \[-1, 1\]'),
    ('stream_eval', dict(lag=257), 'at most 256, after which'),
    ('stream_eval', dict(lag=-1), 'must be at least 0'),
    ('stream_eval', dict(seq_len=23, lag=3), 'seq_len >= 24'),
    ('stream_eval', dict(key_length=0), 'key_length=0 must be'),
    ('passkey', dict(filler='grass'), 'known: random, repeat'),
    ('markov', dict(seq_len=0), 'must be at least 1'),
    ('markov', dict(num_states=1), 'must be at least 2'),
    ('multi_needle', dict(seq_len=35), 'seq_len >= 36'),
    ('multi_needle', dict(vocab_size=45), 'vocab_size >= 46'),
    ('multi_needle', dict(num_queries=5), 'num_queries <= num_needles'),
    ('multi_needle', dict(num_keys=3), 'num_needles <= num_keys'),
    ('multi_needle', dict(num_queries=0), 'num_queries=0 must be at least 1'),
    ('multi_needle', dict(value_length=0), 'at least 1'),
    ('multi_needle', dict(filler='grass'), 'known: random, repeat'),
    ('ngram_lookup', dict(key='infix'), 'known: prefix, suffix'),
    ('ngram_lookup', dict(answer_length=0), 'at least 1'),
    ('ngram_lookup', dict(seq_len=14), 'seq_len >= 15'),
    ('ngram_lookup', dict(seq_len=15, key='prefix'), 'seq_len >= 16'),
    ('ngram_lookup', dict(max_length=60), 'seq_len >= 68'),
    ('ngram_lookup', dict(min_length=6), '7 <= min_length <= max_length'),
    ('ngram_lookup', dict(min_length=57), 'from 57 to 56'),
    ('ngram_lookup', dict(num_symbols=3), r'num_symbols\*\*key_length >= 54'),
    ('phone_book', dict(seq_len=16), 'seq_len >= 17'),
    ('phone_book', dict(num_entries=7), 'a book of 7 .* seq_len >= 71'),
    ('phone_book', dict(num_letters=1), 'make 1 names: .* the 6 entries'),
    ('phone_book', dict(name_length=14, seq_len=80), r'fewer than 2\*\*63'),
    ('phone_book', dict(number_length=0), 'at least 1'),
    ('phone_book', dict(num_entries=-1), 'must be at least 0'),
    ('variable_tracking', dict(seq_len=29), 'seq_len >= 30'),
    ('variable_tracking', dict(vocab_size=51), 'vocab_size >= 52'),
    ('variable_tracking', dict(num_values=2), 'num_chains=3: each'),
    ('variable_tracking', dict(num_variables=8), 'num_variables >= 9'),
    ('variable_tracking', dict(num_chains=0), 'at least 1'),
    ('variable_tracking', dict(num_hops=-1), 'must be at least 0'),
  ],
)
def test_bad_field_ends_with_one_line(name, fields, message):
  with pytest.raises(ValueError, match=message) as error:
    make_task(name, **fields)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', sorted(TASKS.keys() - {'text_lm'}))
def test_task_fields_make_the_task_again(name):
  task = make_task(name, seq_len=80)
  assert make_task(**task_fields(task)) == task
  assert task_defaults(name, seq_len=80) == task_fields(task)


def test_integers_are_taken_for_floats():
  assert make_task('passkey', depth=1) == make_task('passkey', depth=1.0)
