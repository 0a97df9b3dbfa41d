"""Text to tokens and back: a byte-level BPE trained here, or any fast Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from picotron_core.errors import ConfigError, reason
from picotron_core.files import make_folder, replace_text

EOS = "<|endoftext|>"
SMALLEST_VOCAB = 257  # every byte, and EOS: below that some text could not be written


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A trained tokenizer and the token that ends a document.

    A special token that is spelled out in a text becomes that token, as in transformers: corpora
    that separate documents by a written "<|endoftext|>" mean just that.
    """

    backend: tokenizers.Tokenizer
    eos_id: int

    @property
    def vocab_size(self) -> int:
        """One above the highest id: what an embedding needs, even where ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the ids."""
        return hashlib.sha256(f"{self.eos_id}\n{self.backend.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with no special token added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts, on every core."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included. A character cut in half reads as U+FFFD, so that any
        prefix of a sequence can be shown while the rest is still to come."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def save(self, directory: Path | str) -> None:
        """Write the two files that transformers' `AutoTokenizer.from_pretrained` reads."""
        directory = Path(directory)
        make_folder(directory)
        replace_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.backend.id_to_token(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        replace_text(directory / "tokenizer_config.json", text)


def open_tokenizer(directory: Path, *, eos_id: int) -> Tokenizer:
    """What `Tokenizer.save` wrote, without the seconds that importing transformers takes."""
    return Tokenizer(
        backend=tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), eos_id=eos_id
    )


def read_tokenizer(content: bytes, *, eos_id: int) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json that `Tokenizer.save` wrote."""
    return Tokenizer(backend=tokenizers.Tokenizer.from_str(content.decode()), eos_id=eos_id)


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
    backend.train_from_iterator(_reported(documents, on_progress), trainer)
    return Tokenizer(backend=backend, eos_id=0)  # special tokens come first


def _reported(documents: Iterable[str], on_progress: Callable[[int], None] | None) -> Iterator[str]:
    done = 0
    for text in documents:
        yield text
        done += len(text.encode())
        if on_progress is not None:
            on_progress(done)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """A Hugging Face tokenizer: a folder, a tokenizer.json, or a name on the hub.

    Raises: ConfigError if it cannot be loaded, has no fast implementation, or has no EOS token.
    """
    from transformers import AutoTokenizer

    path = Path(name_or_path).expanduser()
    found = str(path.parent if path.name == "tokenizer.json" else path)
    try:
        loaded = AutoTokenizer.from_pretrained(
            found if path.exists() else name_or_path, trust_remote_code=False
        )
    except Exception as error:  # files, hub, Rust: each raises its own
        if "trust_remote_code" in str(error):  # transformers' advice is to allow it
            raise ConfigError(
                f"The tokenizer {name_or_path!r} needs code of its own, and Picotron runs no code "
                "from model folders. Name another with --data.tokenizer, or save it once as a "
                "plain tokenizer.json."
            ) from error
        raise ConfigError(
            f"Cannot load the tokenizer {name_or_path!r}: {reason(error)}. Check --data.tokenizer: "
            "a folder with tokenizer.json and tokenizer_config.json, or a name on the hub."
        ) from error
    fast = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(fast, tokenizers.Tokenizer):
        raise ConfigError(
            f"The tokenizer {name_or_path!r} has no fast implementation (tokenizer.json), which "
            "Picotron needs. Name another with --data.tokenizer."
        )
    if loaded.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer {name_or_path!r} has no EOS token, which separates documents. Set "
            "eos_token in its tokenizer_config.json."
        )
    backend = tokenizers.Tokenizer.from_str(fast.to_str())  # ours: theirs may truncate or pad
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend=backend, eos_id=int(loaded.eos_token_id))
