"""Tokenizers: what they read and write, and what they refuse."""

import dataclasses
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from longctx.tasks.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from longctx.tasks.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

TEXT = (
  'the end of the day, the end of 1234 days; naïve 日本語 \U0001f600\n\n' * 9
)
TEMPLATE = """\
{% for message in messages %}
  {% if message.role == 'nobody' %}
    {{ raise_exception('nobody speaks') }}
  {% endif %}
<bos>{{ message.role }}: {% generation %}{{ message.content }}
{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<bos>assistant:
{%- endif %}
"""
PLAIN = tiny_tokenizer(TEXT)
WITH_BOS = tiny_tokenizer(TEXT, bos=1, stops=(0, 1), template=TEMPLATE)


TOKENS = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
PIECES = ['\u2581', 'a', 'n', 'an', '\u2581a', 'na', '\n\n']
# As of a GGUF file of Llama 2 or Gemma.
SPM = {
  'tokenizer.ggml.model': 'llama',
  'tokenizer.ggml.tokens': TOKENS + PIECES,
  'tokenizer.ggml.scores': [0.0] * 262 + [-1.0, -2.0, -3.0, 0.0],
  'tokenizer.ggml.token_type': [2, 3, 3] + [6] * 256 + [1] * 6 + [4],
  'tokenizer.ggml.bos_token_id': 1,
  'tokenizer.ggml.eos_token_id': 2,
  'tokenizer.ggml.add_space_prefix': False,
}
SENTENCEPIECE = tokenizer_from_gguf(SPM)
both = pytest.mark.parametrize(
  'tokenizer', [PLAIN, SENTENCEPIECE], ids=['bytes', 'sentencepiece']
)


@both
@given(text=st.text())
def test_a_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
  ids = tokenizer.encode(text, special=False)
  assert tokenizer.decode(ids) == text
  assert ''.join(tokenizer.stream(ids)) == text
  assert tokenizer.byte_counts[ids].sum() == len(text.encode())
  assert tokenizer.encode_plain([text, 'a']) == [
    ids,
    tokenizer.encode('a', special=False),
  ]


@both
def test_streams_write_whole_characters(tokenizer):
  text = 'an \U0001f99c and 中文字'
  ids = tokenizer.encode(text)
  parts = list(tokenizer.stream(ids))
  assert ''.join(parts) == text
  assert len(ids) > len(parts) > 5
  assert '\U0001f99c' in ''.join(parts[:5])
  # A character that is cut off is shown as such.
  cut = list(tokenizer.stream(ids[:-1]))
  assert ''.join(cut).startswith('an \U0001f99c and 中文')
  assert cut[-1].endswith('\ufffd')


def test_special_tokens_in_a_plain_text_are_characters():
  text = 'the<eos>end'
  read, plain = PLAIN.encode(text), PLAIN.encode(text, special=False)
  assert 0 in read and 0 not in plain
  assert PLAIN.decode(plain) == text
  assert PLAIN.decode(read) == 'theend'
  assert PLAIN.decode(read, special=True) == text
  assert PLAIN.byte_counts[read].sum() == len('theend')


def test_saved_files_load_again_with_all_that_belongs_to_them(tmp_path):
  WITH_BOS.save(tmp_path)
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    again = Tokenizer.load(path)
    assert again.files() == WITH_BOS.files()
    assert again.digest == WITH_BOS.digest
    assert again.encode(TEXT) == WITH_BOS.encode(TEXT)
    for name in ('bos', 'eos', 'stops', 'template', 'vocab_size'):
      assert getattr(again, name) == getattr(WITH_BOS, name)
  assert tiny_tokenizer(TEXT, vocab_size=270).digest != WITH_BOS.digest


def test_files_of_other_programs_are_read(tmp_path):
  backend = tokenizers.Tokenizer.from_str(PLAIN.backend.to_str())
  backend.enable_truncation(4)
  backend.enable_padding()
  backend.save(str(tmp_path / 'tokenizer.json'))
  files = {
    'special_tokens_map.json': {'eos_token': {'content': '<eos>'}},
    'tokenizer_config.json': {
      'bos_token': '<bos>',
      'add_bos_token': True,
      'chat_template': [
        {'name': 'tool_use', 'template': 'no'},
        {'name': 'default', 'template': 'yes'},
      ],
    },
    'generation_config.json': {'eos_token_id': [7, 0]},
  }
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  found = Tokenizer.load(tmp_path)
  assert (found.bos, found.eos, found.stops) == (1, 0, (0, 7))
  assert found.chat([]) == 'yes'
  assert found.encode(TEXT) == [1, *PLAIN.encode(TEXT)]
  (tmp_path / 'chat_template.jinja').write_text('of a file')
  assert Tokenizer.load(tmp_path).chat([]) == 'of a file'


def test_a_prompt_begins_with_one_bos(tmp_path):
  metadata = gguf(PLAIN, **{'tokenizer.ggml.add_bos_token': True})
  tokenizer = tokenizer_from_gguf(metadata)
  assert tokenizer.adds_bos and not PLAIN.adds_bos
  words = PLAIN.encode('the end')
  for text in ('the end', '<bos>the end'):
    assert tokenizer.encode(text) == [1, *words]
  assert tokenizer.encode('the end', special=False) == words
  tokenizer.save(tmp_path)
  assert Tokenizer.load(tmp_path).encode('the end') == [1, *words]


def test_a_chat_is_written_by_the_template():
  messages = [dict(role='user', content='hello')]
  assert WITH_BOS.chat(messages) == '<bos>user: hello\n<bos>assistant:'
  without = WITH_BOS.chat(messages, add_generation_prompt=False)
  assert without == '<bos>user: hello\n'


@pytest.mark.parametrize(
  ('template', 'role', 'message'),
  [
    (None, 'user', 'has no chat template'),
    (TEMPLATE, 'nobody', 'chat template: nobody speaks'),
    ('{% for %}', 'user', 'chat template: Expected an expression'),
    ("{{ ''.__class__.__mro__ }}", 'user', "access to attribute '__class__'"),
  ],
)
def test_a_chat_that_cannot_be_written_says_why(template, role, message):
  tokenizer = dataclasses.replace(PLAIN, template=template)
  with pytest.raises(ValueError, match=message) as error:
    tokenizer.chat([dict(role=role, content='')])
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({}, 'cannot read a tokenizer from .*tokenizer.json .* No such file'),
    ({'tokenizer.json': '{"model"'}, 'cannot read a tokenizer from'),
    ({'tokenizer_config.json': '[1'}, 'cannot read .*tokenizer_config.json'),
    (
      {'tokenizer_config.json': '{"eos_token": "<end>"}'},
      "has no token '<end>', which its config names",
    ),
    ({'generation_config.json': '{"eos_token_id": 999}'}, 'token 999'),
  ],
)
def test_files_that_cannot_be_read_end_with_one_line(files, message, tmp_path):
  if files and 'tokenizer.json' not in files:
    PLAIN.backend.save(str(tmp_path / 'tokenizer.json'))
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message) as error:
    Tokenizer.load(tmp_path)
  assert '\n' not in str(error.value)


def gguf(tokenizer, **changes):
  """Metadata of a GGUF file of this tokenizer."""
  spec = json.loads(tokenizer.backend.to_str())
  vocab = spec['model']['vocab']
  tokens = sorted(vocab, key=vocab.get)
  special = [token['content'] for token in spec['added_tokens']]
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3 if t in special else 1 for t in tokens],
    'tokenizer.ggml.merges': [' '.join(m) for m in spec['model']['merges']],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 0,
    'tokenizer.chat_template': TEMPLATE,
    **changes,
  }


@given(text=st.text())
def test_gguf_metadata_make_the_tokenizer_that_they_were_made_of(text):
  found = FROM_GGUF
  assert found.encode(text) == PLAIN.encode(text)
  assert (found.bos, found.eos, found.stops) == (1, 0, (0,))
  assert found.template == TEMPLATE
  assert found.decode(found.encode(text + '<eos>')) == text


FROM_GGUF = tokenizer_from_gguf(gguf(PLAIN))


@pytest.mark.parametrize(
  ('pre', 'words'),
  [
    ('gpt-2', "in| 2026|'|LL| it|'s|  | go|\n\n"),
    ('smollm', "in| |2|0|2|6|'|LL| it|'s|  | go|\n\n"),
    ('llama-bpe', "in| |202|6|'LL| it|'s|  | go|\n\n"),
    ('qwen2', "in| |2|0|2|6|'LL| it|'s|  | go|\n\n"),
    ('default', "in| |202|6|'|LL| it|'|s|  | go|\n\n"),
  ],
)
def test_pre_tokenizers_split_as_they_are_known_to(pre, words):
  found = tokenizer_from_gguf(gguf(PLAIN, **{'tokenizer.ggml.pre': pre}))
  text = "in 2026'LL it's   go\n\n"
  split = found.backend.pre_tokenizer.pre_tokenize_str(text)
  assert [text[a:b] for _, (a, b) in split] == words.split('|')


@pytest.mark.parametrize('pre', PRE_TOKENIZERS)
def test_no_pre_tokenizer_loses_text(pre):
  found = tokenizer_from_gguf(gguf(PLAIN, **{'tokenizer.ggml.pre': pre}))
  text = TEXT + "  it's DON'T 12,345.67 <=> \r\n\t x"
  assert found.decode(found.encode(text)) == text


def test_sentencepiece_joins_the_best_pair_first():
  names = (TOKENS + PIECES).index
  # 'an' is better than ' a' and than 'na'.
  expected = ['<s>', 'an', '\u2581', 'an', '\n\n', 'na', '\u2581a', '<0xC3>']
  found = SENTENCEPIECE.encode('an an\n\nna a\u00e9')
  assert found == [*map(names, expected), names('<0xA9>')]
  prefixed = tokenizer_from_gguf(
    SPM | {'tokenizer.ggml.add_space_prefix': True}
  )
  found = prefixed.encode('a an')
  assert found == [*map(names, ['<s>', '\u2581a', '\u2581', 'an'])]
  assert prefixed.decode(found) == 'a an'
  # Only at the beginning a space is no part of the text.
  assert ''.join(prefixed.stream(found[1:2], after=found[:1])) == 'a'
  assert ''.join(prefixed.stream(found[2:], after=found[:2])) == ' an'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tokenizer.ggml.model': 'bert'}, "model='bert'.* known: gpt2, llama"),
    ({'tokenizer.ggml.pre': 'smolm'}, "pre='smolm'; did you mean smollm"),
    ({'tokenizer.ggml.eos_token_id': 999}, 'token 999, BOS or EOS'),
    ({'tokenizer.ggml.merges': ['x yz w']}, 'tokenizer.ggml.merges: '),
    ({'tokenizer.ggml.merges': None}, 'has no tokenizer.ggml.merges'),
  ],
)
def test_gguf_metadata_that_are_not_known_end_with_one_line(changes, message):
  metadata = {k: v for k, v in gguf(PLAIN, **changes).items() if v is not None}
  with pytest.raises((ValueError, NotImplementedError), match=message) as error:
    tokenizer_from_gguf(metadata)
  assert '\n' not in str(error.value)


def test_transformers_reads_what_is_saved(tmp_path):
  transformers = pytest.importorskip('transformers')
  WITH_BOS.save(tmp_path)
  found = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert found(TEXT).input_ids == WITH_BOS.encode(TEXT)
  assert (found.bos_token_id, found.eos_token_id) == (1, 0)
  messages = [dict(role='user', content='hello')]
  written = found.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )
  assert written == WITH_BOS.chat(messages)


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('tokenizer_config', '{"eos_token": 5}'),
    ('tokenizer_config', '{"chat_template": [{"name": "default"}]}'),
    ('generation_config', '{"eos_token_id": "x"}'),
    ('generation_config', '{"eos_token_id": {}}'),
  ],
)
def test_a_value_of_another_kind_beside_it_is_refused(name, text, tmp_path):
  tiny_tokenizer('import os').save(tmp_path)
  (tmp_path / f'{name}.json').write_text(text)
  with pytest.raises(ValueError, match='of another kind'):
    Tokenizer.load(tmp_path)
