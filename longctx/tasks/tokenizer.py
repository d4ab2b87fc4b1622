"""Tokenizer: text to token ids and back, of a tokenizer.json.

tokenizer = Tokenizer.load('smollm2/')
tokenizer.encode('The capital of France is')       # [504, 3575, ...]
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from jaxtyping import Int32, Shaped
from tokenizers import decoders, processors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """Tokenizer around the `tokenizers` package, with what its model expects.

  Attributes:
    backend: splits and merges.
    bos: the token that begins a text; None: there is none.
    eos: the token that ends one.
    stops: all tokens that end what a model writes, `eos` among them.
    template: Jinja source that writes a chat as a prompt; None: no chat.
  """

  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  bos: int | None = None
  eos: int | None = None
  stops: tuple[int, ...] = ()
  template: str | None = None

  @classmethod
  def load(cls, path: str | pathlib.Path) -> 'Tokenizer':
    """Reads a tokenizer.json, or the folder that holds it.

    Beside it, where they are: tokenizer_config.json, special_tokens_map.json,
    generation_config.json and chat_template.jinja.

    Raises:
      ValueError: one of them is missing or cannot be read.
    """
    path = pathlib.Path(path).expanduser()
    file = path / 'tokenizer.json' if path.is_dir() else path
    try:
      backend = tokenizers.Tokenizer.from_str(file.read_text('utf-8'))
    except Exception as error:
      # tokenizers raises Exception itself.
      raise ValueError(
        f'cannot read a tokenizer from {file} ({first_line(error)}): give a '
        'tokenizer.json, or the folder that holds it'
      ) from error
    # It may bring the length and padding that it was trained with.
    backend.no_truncation()
    backend.no_padding()
    try:
      return cls._beside(backend, file)
    except (LookupError, TypeError) as error:
      raise ValueError(
        f'a file beside {file} has a value of another kind than is wanted: '
        f'{first_line(error)}'
      ) from error

  @classmethod
  def _beside(
    cls, backend: tokenizers.Tokenizer, file: pathlib.Path
  ) -> 'Tokenizer':
    """A tokenizer with what the files beside its own say."""
    names = ('special_tokens_map', 'tokenizer_config')
    names = {k: v for n in names for k, v in _read_json(file, n).items()}
    generation = _read_json(file, 'generation_config')
    stops = generation.get('eos_token_id')
    stops = [] if stops is None else np.atleast_1d(stops).tolist()
    bos = _token_id(backend, names.get('bos_token'), file)
    eos = _token_id(backend, names.get('eos_token'), file)
    bos = generation.get('bos_token_id') if bos is None else bos
    eos = next(iter(stops), None) if eos is None else eos
    template = names.get('chat_template')
    if isinstance(template, list):
      named = {entry['name']: entry['template'] for entry in template}
      template = named.get('default')
    jinja = file.with_name('chat_template.jinja')
    if jinja.exists():
      template = jinja.read_text('utf-8')
    made = cls.of(backend, bos, eos, stops, template)
    if names.get('add_bos_token') and bos is not None and not made.adds_bos:
      add_bos(backend, bos)
    return made

  @classmethod
  def of(
    cls,
    backend: tokenizers.Tokenizer,
    bos: int | None,
    eos: int | None,
    stops: Iterable[int | None],
    template: str | None,
  ) -> 'Tokenizer':
    """A tokenizer whose text ends with `eos` or one of `stops`.

    Raises:
      ValueError: BOS or EOS is no token.
    """
    stops = dict.fromkeys(x for x in (eos, *stops) if x is not None)
    for token in (bos, *stops):
      if token is not None and backend.id_to_token(token) is None:
        raise ValueError(
          f'token {token}, BOS or EOS of a tokenizer, is not among its '
          f'{backend.get_vocab_size()} tokens'
        )
    return cls(
      backend=backend, bos=bos, eos=eos, stops=tuple(stops), template=template
    )

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes `files` into a folder."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in self.files().items():
      (folder / name).write_text(text, 'utf-8')

  def files(self) -> dict[str, str]:
    """Texts of tokenizer.json and its companions, as `load` and others read."""
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      'bos_token': self._name(self.bos),
      'eos_token': self._name(self.eos),
      'chat_template': self.template,
    }
    config = {k: v for k, v in config.items() if v is not None}
    files = {
      'tokenizer.json': self.backend.to_str(pretty=True),
      'tokenizer_config.json': json.dumps(config, indent=2),
    }
    if len(self.stops) > 1:
      stops = {'eos_token_id': self.stops}
      files['generation_config.json'] = json.dumps(stops, indent=2)
    return files

  @functools.cached_property
  def digest(self) -> str:
    """Tells tokenizers that split a text otherwise."""
    text = self.backend.to_str()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  @functools.cached_property
  def vocab_size(self) -> int:
    """All ids are below; some of them may be of no token."""
    return max(self.backend.get_vocab().values()) + 1

  @property
  def adds_bos(self) -> bool:
    """Whether a text is to begin with BOS."""
    return self.bos is not None and self.backend.encode('').ids[:1] == [
      self.bos
    ]

  @functools.cached_property
  def byte_counts(self) -> Int32[np.ndarray, ' V']:
    """Bytes of text that each token stands for; of special tokens none."""
    counts = np.zeros(self.vocab_size, np.int32)
    is_bytes = isinstance(self.backend.decoder, decoders.ByteLevel)
    for text, token in self.backend.get_vocab().items():
      if not is_bytes and len(text) == 6 and text.startswith('<0x'):
        counts[token] = 1
      else:
        # Of byte-level tokens each letter stands for a byte.
        counts[token] = len(text if is_bytes else _spaced(text).encode())
    for token, added in self.backend.get_added_tokens_decoder().items():
      counts[token] = 0 if added.special else len(added.content.encode())
    return counts

  def encode(self, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text.

    Args:
      text: as it is, or as `chat` writes it.
      special: take it as a prompt: with what the tokenizer puts around a text
        (a BOS, unless the text begins with it), and special tokens written in
        it as such. False: every character stands for itself.
    """
    begun = self.bos is not None and text.startswith(self._name(self.bos))
    self.backend.encode_special_tokens = not special
    return self.backend.encode(
      text, add_special_tokens=special and not begun
    ).ids

  def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode(special=False)` of several texts at once."""
    self.backend.encode_special_tokens = True
    found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def decode(
    self,
    ids: Iterable[int] | Shaped[np.ndarray, ' T'],
    *,
    special: bool = False,
  ) -> str:
    """Text of token ids, special tokens left out unless asked for."""
    ids = [int(token) for token in ids]
    return self.backend.decode(ids, skip_special_tokens=not special)

  def stream(
    self, ids: Iterable[int], *, after: Sequence[int] = ()
  ) -> Iterator[str]:
    """Yields the text of tokens as they come, in whole characters.

    Args:
      ids: of the text.
      after: tokens before it, such as those of a prompt.
    """
    stream = decoders.DecodeStream(list(after), skip_special_tokens=True)
    pending = []
    for token in ids:
      pending.append(token)
      if text := stream.step(self.backend, token):
        pending = []
        yield text
    if rest := self.decode(pending):
      yield rest

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **fields: Any,
  ) -> str:
    """Writes a chat as a prompt, by the model's template.

    Args:
      messages: each with its 'role' ('system', 'user', 'assistant') and its
        'content'.
      add_generation_prompt: end where the assistant begins to speak.
      **fields: for the template, such as tools.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    if self.template is None:
      raise ValueError(
        'the tokenizer has no chat template, so its model expects plain text: '
        'leave out --chat, or add a chat_template.jinja beside tokenizer.json'
      )
    try:
      return _compile(self.template).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=self._name(self.bos) or '',
        eos_token=self._name(self.eos) or '',
        **fields,
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f'chat template: {first_line(error)}') from error

  def _name(self, token: int | None) -> str | None:
    return None if token is None else self.backend.id_to_token(token)


def add_bos(backend: tokenizers.Tokenizer, bos: int) -> None:
  """Lets every text begin with BOS."""
  name = backend.id_to_token(bos)
  begin = processors.TemplateProcessing(
    single=f'{name} $A', pair=f'{name} $A $B', special_tokens=[(name, bos)]
  )
  before = [] if backend.post_processor is None else [backend.post_processor]
  backend.post_processor = processors.Sequence([*before, begin])


def _read_json(file: pathlib.Path, name: str) -> dict[str, Any]:
  """What a JSON file beside another one holds; nothing where there is none."""
  path = file.with_name(f'{name}.json')
  if not path.exists():
    return {}
  try:
    return dict(json.loads(path.read_text('utf-8')))
  except (OSError, ValueError, TypeError) as error:
    raise ValueError(f'cannot read {path}: {first_line(error)}') from error


def _token_id(
  backend: tokenizers.Tokenizer, token: Any, file: pathlib.Path
) -> int | None:
  """The id of a token that a config names, as a text or as {'content': ...}."""
  text = token.get('content') if isinstance(token, Mapping) else token
  found = None if text is None else backend.token_to_id(text)
  if text is not None and found is None:
    raise ValueError(f'{file} has no token {text!r}, which its config names')
  return found


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
  """A chat template, with what such templates may rely on."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  environment.filters['tojson'] = functools.partial(
    json.dumps, ensure_ascii=False
  )
  environment.globals['raise_exception'] = _refuse
  environment.globals['strftime_now'] = _now
  return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
  """`generation` blocks mark what an assistant has said; the text stays."""

  tags: ClassVar = {'generation'}

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


def _refuse(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _spaced(token: str) -> str:
  """SentencePiece writes a space as U+2581."""
  return token.replace('\u2581', ' ')


def first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
