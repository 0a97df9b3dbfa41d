"""The files of a Hugging Face tokenizer, as they lie in its folder or in its hub repository."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from picotron_core.data.tokenizer import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    Tokenizer,
    around,
    parse_object,
    read_tokenizer,
)
from picotron_core.errors import ConfigError
from picotron_core.files import replace_bytes
from picotron_core.model.model_folder import find_folder

SPECIAL_TOKENS = "special_tokens_map.json"
NAMES = (
    *(TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    # The same vocabulary in the formats that other programs read.
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
)
TEMPLATES = "additional_chat_templates"
LARGEST = 1 << 28  # bytes of one file; the largest vocabularies in use take some 40 MB
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def tokenizer_files(tokenizer: Tokenizer, source: str = "") -> dict[str, bytes]:
    """Every file that belongs to a tokenizer, by name.

    The files of `source` are taken byte for byte, so that chat template and special tokens survive.
    tokenizer.json and tokenizer_config.json are changed only where they would not give the same ids
    and the same text as `tokenizer`, which is what the run uses.

    Args:
        source: the folder, the tokenizer.json or the hub name that `tokenizer` was loaded from;
            "" for one that was trained here.

    Raises: ConfigError where a file cannot be read.
    """
    with TemporaryDirectory(prefix="picotron-") as folder:
        tokenizer.save(folder)
        own = _files_in(Path(folder))
    if not source:
        return own
    path = Path(source).expanduser()
    given = path.parent if path.name == TOKENIZER and path.is_file() else source
    found = _files_in(find_folder(given, [*NAMES, f"{TEMPLATES}/*.jinja"]))
    _fit(found, tokenizer, own)
    return found


def read_files(files: Mapping[str, bytes], *, eos_id: int) -> Tokenizer:
    """The tokenizer that is in these files, without the truncation and padding that they may ask
    for.

    Raises: ValueError that names the file.
    """
    opened = read_tokenizer(files[TOKENIZER], files[TOKENIZER_CONFIG], eos_id=eos_id)
    opened.backend.no_truncation()
    opened.backend.no_padding()
    if opened.backend.id_to_token(eos_id) is None:
        raise ValueError(f"{TOKENIZER} has no token {eos_id}, which ends a document")
    return opened


def _fit(files: dict[str, bytes], tokenizer: Tokenizer, own: Mapping[str, bytes]) -> None:
    """Change the files where they do not give the same ids and text as `tokenizer`."""
    files.setdefault(TOKENIZER_CONFIG, own[TOKENIZER_CONFIG])
    if not _is_same(files, tokenizer):
        files[TOKENIZER] = own[TOKENIZER]
        _name_plain_class(files, tokenizer)
    if not _is_same(files, tokenizer):
        config = parse_object(files[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
        config["clean_up_tokenization_spaces"] = tokenizer.clean_up
        config["split_special_tokens"] = tokenizer.backend.encode_special_tokens
        files[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()


def _name_plain_class(files: dict[str, bytes], tokenizer: Tokenizer) -> None:
    """Have transformers read tokenizer.json as it is, where the class that the config names would
    add tokens of its own again, such as the EOS of T5's, BERT's and RoBERTa's.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="picotron-") as folder:
        for name in (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS):
            if name in files:
                replace_bytes(Path(folder) / name, files[name])
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if around(theirs.backend_tokenizer) == (tokenizer.prefix, []):
        return
    config = parse_object(files[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
    # Those that are not in the config are defaults of its class.
    config = dict(theirs.special_tokens_map) | config
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()


def _is_same(files: Mapping[str, bytes], tokenizer: Tokenizer) -> bool:
    try:
        found = read_files(files, eos_id=tokenizer.eos_id)
        return found.fingerprint == tokenizer.fingerprint
    except (KeyError, ValueError, ConfigError):  # transformers has read another file of the folder
        return False


def _files_in(folder: Path) -> dict[str, bytes]:
    """Links are followed: a folder of the hub's cache has nothing else."""
    templates = sorted(folder.glob(f"{TEMPLATES}/*.jinja"))
    if odd := next((p for p in templates if not PLAIN_NAME.fullmatch(p.name)), None):
        raise ConfigError(f"{odd} has an unusual name: use letters, digits, '_', '-' and '.'.")
    names = [*NAMES, *(f"{TEMPLATES}/{path.name}" for path in templates)]
    return {name: _read(folder / name) for name in names if (folder / name).is_file()}


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    if len(content) > LARGEST:
        raise ConfigError(f"{path} has more than {LARGEST >> 20} MB: no tokenizer is that large.")
    return content
