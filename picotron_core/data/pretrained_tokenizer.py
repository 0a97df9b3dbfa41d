"""A tokenizer by others: a folder with a tokenizer.json, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, processors

from picotron_core.data.tokenizer import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    Tokenizer,
    around,
    parse_backend,
    parse_object,
)
from picotron_core.errors import ConfigError, reason

JSON_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
# What holds a tokenizer for other libraries, or for older versions of transformers.
OTHER_FORMATS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


def load_tokenizer(
    name_or_path: str, *, remedy: str = "Name another tokenizer with --data.tokenizer."
) -> Tokenizer:
    """A Hugging Face tokenizer: a folder, a tokenizer.json, or a name on the hub.

    What its post-processor adds after a text is dropped: a prompt is to be continued, and training
    ends each document by EOS itself.

    Args:
        remedy: how to give another tokenizer, for the errors.

    Raises: ConfigError if it cannot be loaded, has no fast implementation, or has no EOS token.
    """
    path = Path(name_or_path).expanduser()
    folder = path.parent if path.name == TOKENIZER else path
    # A name on the hub has one slash at most.
    local = os.path.lexists(folder) or name_or_path.count("/") > 1 or name_or_path[0] in "./~"
    if local:
        try:
            _refuse_folder(folder)
        except ValueError as error:
            raise ConfigError(f"{error}. {remedy}") from None
    loaded = _load_by_transformers(str(folder) if local else name_or_path, remedy)
    fast = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(fast, tokenizers.Tokenizer):
        raise ConfigError(
            f"The tokenizer {name_or_path!r} has no fast implementation (tokenizer.json), which "
            f"Picotron needs. {remedy}"
        )
    if loaded.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer {name_or_path!r} has no EOS token, which ends each document. Set "
            f"eos_token in its tokenizer_config.json to a token of tokenizer.json. Or: {remedy}"
        )
    backend = tokenizers.Tokenizer.from_str(fast.to_str())  # ours: theirs may truncate or pad
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(loaded.split_special_tokens)
    prefix, suffix = around(backend)
    if suffix:
        tokens = [str(backend.id_to_token(token)) for token in prefix]
        backend.post_processor = processors.TemplateProcessing(
            single=[*tokens, "$A"], special_tokens=list(zip(tokens, prefix, strict=True))
        )
    # transformers ignores the setting for every BPE: there it would remove spaces of the text.
    clean_up = bool(loaded.clean_up_tokenization_spaces) and not isinstance(
        backend.model, models.BPE
    )
    return Tokenizer(backend=backend, eos_id=int(loaded.eos_token_id), clean_up=clean_up)


def _load_by_transformers(name_or_path: str, remedy: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name_or_path)
    # Without its tokenizer_config.json transformers would guess the class by the model's type, and
    # that class would rebuild the tokenizer in its own way instead of reading tokenizer.json.
    bare = os.path.isdir(path) and not (path / TOKENIZER_CONFIG).exists()
    loader: Any = PreTrainedTokenizerFast if bare else AutoTokenizer
    try:
        return loader.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # files, hub, Rust: each raises its own
        if "trust_remote_code" in str(error):  # transformers' advice is to allow it
            raise ConfigError(
                f"The tokenizer {name_or_path!r} needs code of its own, and Picotron runs no code "
                f"from model folders. {remedy} Or save it once as a plain tokenizer.json."
            ) from error
        raise ConfigError(
            f"Cannot load the tokenizer {name_or_path!r}: {reason(error)}. A tokenizer is a "
            f"folder with tokenizer.json and tokenizer_config.json, or a name on the hub. {remedy}"
        ) from error


def _refuse_folder(folder: Path) -> None:
    """Check that a folder holds a tokenizer. What transformers says of one that does not is about
    its own classes, or nothing: some of them begin an empty vocabulary.

    Raises: ValueError that says what is missing or damaged.
    """
    if not os.path.isdir(folder):
        raise ValueError(
            f"No tokenizer {str(folder)!r}: there is no folder with {TOKENIZER} and "
            f"{TOKENIZER_CONFIG} of that name"
        )
    if not os.path.isfile(folder / TOKENIZER):
        others = [name for name in OTHER_FORMATS if os.path.exists(folder / name)]
        if not others:
            raise ValueError(f"The folder {folder} has no {TOKENIZER}, and so no tokenizer")
        raise ValueError(
            f"The folder {folder} has no {TOKENIZER}, only {' and '.join(others)}, which Picotron "
            f"does not read. With sentencepiece and tiktoken installed, transformers writes it: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    files = {name: _content(folder / name) for name in JSON_FILES if os.path.isfile(folder / name)}
    parse_backend(files.pop(TOKENIZER), folder / TOKENIZER)
    for name, content in files.items():
        parse_object(content, folder / name)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
