"""Text to tokens and back: a byte-level BPE trained here, or any fast Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from picotron_core.data.interruptible import Interrupted, interruptible
from picotron_core.errors import ConfigError, DamagedFileError, reason
from picotron_core.files import make_folder, open_regular, replace_text

EOS = "<|endoftext|>"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SMALLEST_VOCAB = 257  # every byte, and EOS: below that some text could not be written


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A trained tokenizer and the token that ends a document.

    A special token that is spelled out in a text becomes that token, as in transformers: corpora
    that separate documents by a written "<|endoftext|>" mean just that. A tokenizer whose config
    says split_special_tokens takes it for plain text.

    Attributes:
        backend: its post-processor adds tokens before a text or none, and nothing after it.
        eos_id: the token that training puts after each document.
        clean_up: whether `decode` removes the spaces before punctuation, as transformers does for
            some tokenizers of words (clean_up_tokenization_spaces).
    """

    backend: tokenizers.Tokenizer
    eos_id: int
    clean_up: bool = False

    @property
    def vocab_size(self) -> int:
        """One above the highest id: what an embedding needs, even where ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the ids."""
        literal = self.backend.encode_special_tokens
        decides = f"{self.eos_id} {self.prefix} {self.clean_up} {literal}\n{self.backend.to_str()}"
        return hashlib.sha256(decides.encode()).hexdigest()

    @property
    def prefix(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text: BOS, or none."""
        return around(self.backend)[0]

    @property
    def policy(self) -> str:
        """What is added to a document, in words: for the log."""
        begin = " ".join(str(self.backend.id_to_token(token)) for token in self.prefix)
        end = self.backend.id_to_token(self.eos_id)
        return f"{f'BOS {begin}' if begin else 'no BOS'} before each document, EOS {end} after it"

    def is_special(self, token: int) -> bool:
        """Whether it is a token that `decode` can skip, as BOS, EOS or those of a chat."""
        added = self.backend.get_added_tokens_decoder().get(token)
        return added is not None and added.special

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with no special token added."""
        with encoding():
            return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts, on every core, with no special token added."""
        with encoding():
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of the beginning of a document, as transformers' `tokenizer(text)` gives them;
        EOS for an empty text without BOS, since training puts EOS before each document.
        """
        with encoding():
            ids = self.backend.encode(text, add_special_tokens=True).ids
        return list(ids) or [self.eos_id]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text. A character cut in half reads as U+FFFD."""
        text = str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return _clean_up(text) if self.clean_up else text

    def save(self, directory: Path | str) -> None:
        """Write the two files that transformers' `AutoTokenizer.from_pretrained` reads."""
        directory = Path(directory)
        make_folder(directory)
        replace_text(directory / TOKENIZER, self.backend.to_str(pretty=True))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.backend.id_to_token(self.eos_id),
            "clean_up_tokenization_spaces": self.clean_up,
        }
        if self.backend.encode_special_tokens:  # tokenizer.json has no place for it
            config["split_special_tokens"] = True
        if len(self.prefix) == 1:
            config["bos_token"] = self.backend.id_to_token(self.prefix[0])
        replace_text(
            directory / TOKENIZER_CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )


def open_tokenizer(directory: Path, *, eos_id: int) -> Tokenizer:
    """What `Tokenizer.save` wrote, without the seconds that importing transformers takes.

    Raises: DamagedFileError that names the file.
    """
    content: list[bytes] = []
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        try:
            with open_regular(directory / name) as file:
                content.append(file.read())
        except OSError as error:
            found = f"{directory / name} cannot be read ({error.strerror})"
            raise DamagedFileError(f"{found}.") from None
    try:
        opened = read_tokenizer(*content, eos_id=eos_id)
        if opened.backend.id_to_token(eos_id) is None:
            raise ValueError(f"it has no token {eos_id}, which is EOS")
    except ValueError as error:
        raise DamagedFileError(f"The tokenizer in {directory} is damaged: {error}.") from None
    return opened


def read_tokenizer(content: bytes, config: bytes, *, eos_id: int) -> Tokenizer:
    """The tokenizer in the content of the two files that `Tokenizer.save` wrote.

    Raises: ValueError that names the file.
    """
    given = parse_object(config, TOKENIZER_CONFIG)
    backend = parse_backend(content, TOKENIZER)
    backend.encode_special_tokens = given.get("split_special_tokens") is True
    return Tokenizer(
        backend=backend,
        eos_id=eos_id,
        clean_up=given.get("clean_up_tokenization_spaces") is True,
    )


def train_tokenizer(
    documents: Iterable[str],
    *,
    vocab_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """A byte-level BPE: the 256 bytes, EOS, and the most frequent merges in these documents.

    The same documents in the same order give the same tokenizer. Too little text for that many
    merges gives a smaller vocabulary. Memory grows with the number of distinct words.

    Args:
        on_progress: called with the bytes of text read so far.

    Raises: ConfigError if vocab_size is below 257.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"A byte-level vocabulary needs {SMALLEST_VOCAB} tokens (256 bytes and {EOS}), not "
            f"{vocab_size}. Raise --data.vocab_size."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    left = Event()
    text = _reported(documents, on_progress, left)
    interruptible(partial(backend.train_from_iterator, text, trainer), left)
    return Tokenizer(backend=backend, eos_id=0)  # special tokens come first


def _reported(
    documents: Iterable[str], on_progress: Callable[[int], None] | None, left: Event
) -> Iterator[str]:
    done = 0
    for text in documents:
        if left.is_set():
            raise Interrupted
        yield text
        done += len(text.encode())
        if on_progress is not None:
            on_progress(done)


def parse_backend(content: bytes, name: Path | str) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json.

    Args:
        name: the file, for errors.

    Raises: ValueError.
    """
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({reason(error)})") from None
    except BaseException as error:
        # tokenizers raises plain Exception, and its panics are no Exceptions.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{name} is damaged, or of a newer version of tokenizers ({reason(error)})"
        ) from None


def parse_object(content: bytes, name: Path | str) -> dict[str, Any]:
    """The JSON object in the content of a file; see `parse_backend`."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({reason(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


@contextmanager
def encoding() -> Iterator[None]:
    """Raises: ConfigError for a text that a tokenizer has no tokens for: one of words, that lacks
    a token for unknown ones.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # that is what tokenizers raises
            raise
        raise ConfigError(
            f"The tokenizer cannot encode the text: {reason(error)}. Name another tokenizer with "
            "--data.tokenizer."
        ) from None


def around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before a text, and those that it adds after it.

    Raises: ConfigError where it does something else to a text.
    """
    if backend.post_processor is None:
        return [], []
    for text in _samples(backend):
        with encoding():
            bare = backend.encode(text, add_special_tokens=False).ids
            whole = backend.encode(text, add_special_tokens=True).ids
        if bare:
            added = len(whole) - len(bare)
            for before in range(added + 1):
                if whole[before : before + len(bare)] == bare:
                    return whole[:before], whole[before + len(bare) :]
            break
    raise ConfigError(
        "The tokenizer's post-processor (post_processor in tokenizer.json) changes a text instead "
        "of adding tokens before and after it. Name another tokenizer with --data.tokenizer."
    )


def _samples(backend: tokenizers.Tokenizer) -> Iterator[str]:
    yield from ("a", "0")
    yield from backend.get_vocab()  # a tokenizer of words may know neither


def _clean_up(text: str) -> str:
    """As `clean_up_tokenization` of transformers, in its order."""
    for written in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(written, written.strip())
    return text
