"""text_lm: real text in the tokens of any tokenizer."""

import json
import math
import shutil

import numpy as np
import pytest

from longctx.cli import flags
from longctx.data import prepared
from longctx.evaluation import sweep
from longctx.evaluation.streaming import StreamConfig, evaluate_stream
from longctx.tasks import SPLITS, make_task, task_fields, text_lm
from longctx.tasks.documents import read_documents
from longctx.tasks.gguf_tokenizer import tokenizer_from_gguf
from longctx.tasks.text_lm import load_tokens
from longctx.training import runs, trainer
from tests.tasks.test_tokenizer import TEMPLATE, gguf
from tests.tiny import tiny_config, tiny_tokenizer

WORDS = ['the end ', 'of <eos> day ', 'naïve\n', '日本 ', '  12345', '\n\nx']


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
  """A cache that is empty at first."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp('cache')
    patch.setenv('LONGCTX_CACHE', str(folder))
    yield folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """60 documents."""
  root = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for i in range(60):
    (root / f'{i}.txt').write_text(''.join(rng.choice(WORDS, 40)) + str(i))
  return root


TINY = tiny_tokenizer(''.join(WORDS) * 9, template=TEMPLATE)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """A tokenizer with EOS alone, as GPT-2's."""
  path = tmp_path_factory.mktemp('plain')
  TINY.save(path)
  return str(path)


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A tokenizer that begins texts with BOS, as Llama's."""
  path = tmp_path_factory.mktemp('llama')
  metadata = gguf(TINY, **{'tokenizer.ggml.add_bos_token': True})
  tokenizer_from_gguf(metadata).save(path)
  return str(path)


def documents(folder, split):
  found = read_documents(str(folder), '', '')
  return [d.text.decode() for d in found if d.split == split]


def test_text_is_every_document_with_its_marks(folder, plain, llama):
  for path, begin, end in ((plain, 0, []), (llama, 1, [0])):
    task = make_task('text_lm', path=str(folder), tokenizer=path, seq_len=20)
    for split in SPLITS:
      expected = [
        token
        for text in documents(folder, split)
        for token in (begin, *TINY.encode(text, special=False), *end)
      ]
      assert task.text(split).tolist() == expected
      assert len(documents(folder, split)) > 1
    assert task.vocab_size == TINY.vocab_size
    assert make_task(**task_fields(task)) == task


def test_text_is_tokenized_once(folder, plain, cache, monkeypatch):
  task = make_task('text_lm', path=str(folder), tokenizer=plain, seq_len=20)
  text = task.text('test').tolist()
  load_tokens.cache_clear()
  monkeypatch.setattr(text_lm.Tokenizer, 'encode_plain', None)
  other = make_task('text_lm', path=str(folder), tokenizer=plain, seq_len=30)
  assert other.text('test').tolist() == text
  assert isinstance(other.text('test'), np.memmap)
  assert other.text('test').dtype == np.uint16
  assert not list(cache.glob('text_lm/.incomplete-*'))


def test_windows_are_the_text_and_score_all_but_bos(folder, plain, llama):
  for path in (plain, llama):
    task = make_task('text_lm', path=str(folder), tokenizer=path, seq_len=60)
    for split in SPLITS:
      whole = ' '.join(map(str, task.text(split)))
      for index in range(10):
        example = task.get(0, split, index)
        window = [*example.tokens.tolist(), int(example.labels[-1])]
        assert ' '.join(map(str, window)) in whole
        assert example.labels[:-1].tolist() == window[1:-1]
        assert (example.weights == (example.labels != 1)).all()
    anchored = make_task(
      'text_lm', path=str(folder), tokenizer=path, prepend_bos=True
    )
    assert anchored.get(0, 'train', 0).tokens[0] == task.bos


def test_packed_documents_begin_with_their_mark(folder, plain, llama):
  for path, begin in ((plain, 0), (llama, 1)):
    task = make_task(
      'text_lm', path=str(folder), tokenizer=path, seq_len=400, packed=True
    )
    example = task.get(0, 'train', 3)
    begins = example.tokens == begin
    begins[0] = True
    assert (example.segment_ids == np.cumsum(begins)).all()
    assert example.segment_ids.max() > 1


def test_separator_is_what_the_task_names(folder, plain, tmp_path):
  task = make_task(
    'text_lm', path=str(folder), tokenizer=plain, separator='<bos>'
  )
  assert task.text('train')[0] == 1
  assert task.get(0, 'train', 0).weights.all()
  tiny_tokenizer('text', eos=None, stops=()).save(tmp_path)
  named = dict(path=str(folder), tokenizer=str(tmp_path), separator='<eos>')
  assert make_task('text_lm', **named).bos == 0


def test_bytes_of_scored_tokens_are_those_of_the_text(folder, plain, llama):
  for path in (plain, llama):
    task = make_task('text_lm', path=str(folder), tokenizer=path, seq_len=20)
    texts = documents(folder, 'train')
    size = sum(len(text.encode()) for text in texts)
    assert task.byte_counts[task.text('train')].sum() == size
  task = make_task('bytes_lm', path=str(folder), seq_len=20)
  assert task.byte_counts[task.text('train')].sum() == size


def test_long_documents_are_cut_where_no_token_is(plain, tmp_path, monkeypatch):
  for i in range(60):
    lines = ['', 'naïve day', ' of the', '日本', 'the end', f' {i}'] * 9
    (tmp_path / str(i)).write_text('\n'.join(lines))
  task = make_task('text_lm', path=str(tmp_path), tokenizer=plain, seq_len=20)
  whole = task.text('train').tolist()
  load_tokens.cache_clear()
  monkeypatch.setattr(text_lm, 'PART', 100)
  monkeypatch.setattr(text_lm, 'VERSION', 'cut')
  cut = task.text('train').tolist()
  assert TINY.decode(cut) == TINY.decode(whole)
  assert cut == whole


def test_a_document_without_lines_is_cut_between_characters(
  plain, tmp_path, monkeypatch
):
  path = tmp_path / 'one.txt'
  path.write_text('日本語文字' * 400)
  monkeypatch.setattr(text_lm, 'PART', 64)
  task = make_task('text_lm', path=str(path), tokenizer=plain, seq_len=20)
  texts = [TINY.decode(task.text(split)) for split in SPLITS]
  assert ''.join(texts) == path.read_text()
  assert all(texts)


def test_what_the_text_is_follows_from_text_and_tokenizer(
  folder, plain, tmp_path
):
  tiny_tokenizer('other').save(tmp_path / 'other')
  shutil.copytree(plain, tmp_path / 'same')
  shutil.copytree(folder, tmp_path / 'text')
  (tmp_path / 'text' / '0.txt').write_text('changed')
  first, same, other = (
    make_task('text_lm', path=str(folder), tokenizer=str(path)).text_digest
    for path in (plain, tmp_path / 'same', tmp_path / 'other')
  )
  assert first == same != other
  changed = make_task('text_lm', path=str(tmp_path / 'text'), tokenizer=plain)
  assert changed.text_digest != first


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(tokenizer=''), 'task.tokenizer is empty'),
    (dict(tokenizer='/no/such'), 'cannot read a tokenizer from /no/such'),
    (dict(separator='<sep>'), "separator='<sep>' is no token of"),
    (dict(tfds_name='b'), 'are both set'),
    (dict(path='/no/such/text'), 'cannot read text from /no/such/text'),
    (dict(path='latin'), 'latin1.txt is no text in UTF-8 .byte 0xef at 2.'),
    (
      dict(path='binary'),
      'of binary is no text in UTF-8 .byte 0x80',
    ),
    (dict(path='short'), 'split of .* has 0 tokens, fewer than'),
    (dict(path='empty'), 'is empty'),
  ],
)
def test_text_that_cannot_be_read_ends_with_one_line(
  fields, message, plain, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for name, text in (('latin/latin1', 'naïve'), ('short/one', 'one')):
    (tmp_path / name).parent.mkdir()
    (tmp_path / f'{name}.txt').write_text(text, encoding='latin-1')
  (tmp_path / 'empty').touch()
  (tmp_path / 'binary').write_bytes(b'\x80' * 999)
  monkeypatch.setattr(text_lm, 'PART', 64)
  fields = dict(path='short', tokenizer=plain) | fields
  with pytest.raises(ValueError, match=message) as error:
    make_task('text_lm', **fields).get(0, 'validation', 0)
  assert '\n' not in str(error.value)


def test_tokenizer_without_marks_is_refused(tmp_path):
  tiny_tokenizer('text', eos=None, stops=()).save(tmp_path)
  with pytest.raises(ValueError, match='names neither BOS nor EOS'):
    make_task('text_lm', tokenizer=str(tmp_path))


@pytest.fixture(scope='module')
def workdir(folder, plain, tmp_path_factory):
  """A model of tokens after some steps, whose tokenizer is gone."""
  moved = tmp_path_factory.mktemp('moved') / 'tokenizer'
  shutil.copytree(plain, moved)
  config = tiny_config(
    steps=4,
    batch_size=2,
    task=dict(
      name='text_lm', path=str(folder), tokenizer=str(moved), seq_len=32
    ),
  )
  workdir = tmp_path_factory.mktemp('run')
  trainer.train(runs.prepare(config, workdir), workdir)
  shutil.rmtree(moved)
  text_lm.load_tokenizer.cache_clear()
  return workdir


def expected_bits(task, loss, examples):
  """Bits per byte, from a mean loss over examples of the test split."""
  count = size = 0
  for index in range(examples):
    example = task.get(0, 'test', index)
    count += example.weights.sum()
    size += task.byte_counts[example.labels[example.weights > 0]].sum()
  return loss * count / math.log(2) / size


def test_results_have_the_bits_per_byte(workdir):
  (run,) = sweep.open_workdir(workdir)
  results = json.loads((workdir / 'results.json').read_text())
  expected = expected_bits(run.task, results['loss'], 4)
  assert results['bits_per_byte'] == pytest.approx(expected)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  for row in map(json.loads, lines):
    assert row['split'] == 'analysis' or row['bits_per_byte'] > 0
  (row,) = sweep.evaluate(
    [run], workdir, sweep=sweep.parse_sweep(''), batches=2
  )
  assert row['loss'] == pytest.approx(results['loss'])
  assert row['bits_per_byte'] == pytest.approx(results['bits_per_byte'])


def test_a_mesh_counts_the_same_bytes(folder, plain, tmp_path):
  config = tiny_config(
    steps=1,
    batch_size=2,
    task=dict(name='text_lm', path=str(folder), tokenizer=plain, seq_len=32),
    parallel=dict(data=2, seq=2),
  )
  results = trainer.train(runs.prepare(config, tmp_path), tmp_path)['']
  task = make_task(**config.task)
  expected = expected_bits(task, results['loss'], 4)
  assert results['bits_per_byte'] == pytest.approx(expected)


def test_streams_are_of_tokens_and_have_bits_per_byte(workdir):
  (run,) = sweep.open_workdir(workdir)
  config = StreamConfig(
    tokens=16, slots=8, chunk=8, bucket=16, policies=('window',)
  )
  rows = evaluate_stream(run, config)['window']
  task, begin = run.task, 0
  for row in rows:
    labels = task.text('test')[begin + 1 : row['end'] + 1]
    nats = row['loss'] * row['count']
    bits = nats / math.log(2) / task.byte_counts[labels].sum()
    assert row['bits_per_byte'] == pytest.approx(bits)
    begin = row['end']


def test_bytes_of_a_model_of_bytes_are_its_scored_tokens(folder, tmp_path):
  config = tiny_config(
    steps=1,
    batch_size=2,
    task=dict(name='bytes_lm', path=str(folder), seq_len=32),
  )
  results = trainer.train(runs.prepare(config, tmp_path), tmp_path)['']
  assert results['bits_per_byte'] == pytest.approx(results['bits_per_token'])


def test_a_workdir_opens_without_the_tokenizer_it_was_made_with(workdir):
  (run,) = sweep.open_workdir(workdir)
  assert run.task.tokenizer == str(workdir / 'tokenizer')
  assert run.task.codec.files() == TINY.files()
  (longer,) = sweep.swept_tasks(run, sweep.parse_sweep('seq_len=40'))
  assert longer.tokenizer == run.task.tokenizer
  with pytest.raises(ValueError, match='not the task or its tokens'):
    sweep.swept_tasks(run, sweep.parse_sweep('tokenizer=a,b'))


def test_generation_writes_text(workdir, capfdbinary, monkeypatch):
  # No text is read to write some.
  monkeypatch.setattr(text_lm, 'load_tokens', None)
  command = [f'--workdir={workdir}', '--prompt=日本 naïve', '--max_new=9']
  flags.run('generate', command)
  written = capfdbinary.readouterr().out.decode()
  assert written.startswith('日本 naïve') and written.endswith('\n')
  read = []
  module = flags.importlib.import_module('longctx.cli.generate')
  monkeypatch.setattr(
    module.Generator, 'start', lambda self, prompts: read.append(prompts.tokens)
  )
  for options in ([], ['--chat']):
    module.prepare(flags.parse('generate', command + options))
  chat = TINY.chat([dict(role='user', content='日本 naïve')])
  assert [tokens[0].tolist() for tokens in read] == [
    TINY.encode('日本 naïve'),
    TINY.encode(chat),
  ]


@pytest.mark.parametrize('template', [None, "{{ raise_exception('no') }}"])
def test_a_chat_without_a_fit_template_is_refused(
  workdir, template, tmp_path, capsys
):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  path = copy / 'tokenizer' / 'tokenizer_config.json'
  config = json.loads(path.read_text()) | {'chat_template': template}
  path.write_text(json.dumps(config))
  with pytest.raises(SystemExit):
    flags.run('generate', [f'--workdir={copy}', '--prompt=a', '--chat'])
  error = capsys.readouterr().err
  expected = 'no chat template' if template is None else 'chat template: no'
  assert error.startswith('error: ') and expected in error
  assert error.count('\n') == 1


def test_only_a_model_of_text_writes(tmp_path, capsys):
  trainer.train(runs.prepare(tiny_config(steps=1), tmp_path), tmp_path)
  with pytest.raises(SystemExit):
    flags.run('generate', [f'--workdir={tmp_path}', '--prompt=a'])
  assert 'a model of bytes_lm or text_lm' in capsys.readouterr().err


def test_a_prepared_dataset_holds_the_same_examples(folder, plain, tmp_path):
  task = make_task('text_lm', path=str(folder), tokenizer=plain, seq_len=16)
  prepared.prepare(task, seed=0, sizes={'train': 3}, directory=str(tmp_path))
  source = prepared.open_prepared(str(tmp_path), task, split='train', seed=0)
  for index in range(3):
    expected = task.get(0, 'train', index).arrays()
    assert source[index].keys() == expected.keys()
    for name, array in expected.items():
      np.testing.assert_array_equal(source[index][name], array)
