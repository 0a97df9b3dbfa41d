"""The format of a token cache: two flat files of ids, a tokenizer, and a meta.json that vouches.

<key>/train.bin  validation.bin          ids, little-endian, one document after the other
<key>/tokenizer.json  tokenizer_config.json
<key>/meta.json                          written last: counts, dtype, size and crc32 of each
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picotron_core.data.split import Part
from picotron_core.data.tokenizer import Tokenizer, read_tokenizer
from picotron_core.errors import ConfigError, DamagedFileError, DataError
from picotron_core.files import (
    ForeignOwnerError,
    crc32,
    crc32_of,
    open_regular,
    replace_text,
)

FORMAT = 3
META = "meta.json"
FILES: dict[Part, str] = {"train": "train.bin", "validation": "validation.bin"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BLOCK = 1 << 22

Ids = npt.NDArray[Any]  # uint16 or uint32


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised corpus, memory-mapped and read-only.

    `train` and `validation`: 1-D uint16 or uint32 ids, each document begun by the
    tokenizer's `prefix` and ended by `eos_id`.
    `bytes_per_token`: UTF-8 bytes of the validation text over its tokens, BOS and EOS counted;
    nats per token / (bytes_per_token * ln 2) is bits per byte.
    """

    train: Ids
    validation: Ids
    tokenizer: Tokenizer
    vocab_size: int
    eos_id: int
    bytes_per_token: float
    label: str
    folder: Path
    key: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype that holds every id below vocab_size.

    Raises: ConfigError above 2**32.
    """
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        if vocab_size <= 2 ** (8 * dtype.itemsize):
            return dtype
    raise ConfigError(
        f"A vocabulary of {vocab_size} does not fit the widest token dtype, uint32 (2**32 ids). "
        "Choose a smaller one with --data.tokenizer or --data.vocab_size."
    )


def fit_tokens(ids: list[int], vocab_size: int) -> Ids:
    """The ids in the dtype of the vocabulary; one outside it is an error and never wraps."""
    wide = np.asarray(ids, dtype=np.int64)
    outside = wide[(wide < 0) | (wide >= vocab_size)]
    if outside.size:
        raise ConfigError(
            f"Token id {outside[0]} lies outside a vocabulary of {vocab_size}: the tokenizer "
            "contradicts itself. Choose another with --data.tokenizer."
        )
    return wide.astype(token_dtype(vocab_size))


def write_meta(
    folder: Path,
    *,
    tokenizer: Tokenizer,
    text_bytes: Mapping[Part, int],
    skipped: Mapping[str, int],
    key: str,
) -> None:
    """Vouch for the files that lie in `folder`; nothing may be written to them after.

    Args:
        key: of all that decides the tokens.
        skipped: how many records were skipped, by reason.
    """
    files = {}
    for name in (*FILES.values(), *TOKENIZER_FILES):
        files[name] = {"bytes": (folder / name).stat().st_size, "crc32": crc32(folder / name)}
    dtype = token_dtype(tokenizer.vocab_size)
    meta = {
        "format": FORMAT,
        "key": key,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokens": {part: files[name]["bytes"] // dtype.itemsize for part, name in FILES.items()},
        "text_bytes": dict(text_bytes),
        "skipped_records": dict(skipped),
        "files": files,
    }
    vouched = {"meta": meta, "crc32": zlib.crc32(_canonical(meta))}
    replace_text(folder / META, json.dumps(vouched, indent=2) + "\n")


def open_tokens(
    folder: Path, corpus: str = "corpus", *, key: str = "", owners: Collection[int] | None = None
) -> Tokens:
    """Open a token cache, after reading every byte of it once.

    Args:
        corpus: what it was asked for; what it was made from may have lain elsewhere.
        key: of the tokens that are wanted; "" for any.
        owners: the users to whom its files may belong; None for anyone.

    Raises: DamagedFileError that names the file if any is missing, cut, changed, a link, or
        another user's; DataError if they cannot be read.
    """
    meta = _read_meta(folder, owners)
    if key and meta["key"] != key:
        raise _damaged(folder / META, "is of other tokens: the folder was renamed or copied")
    vocab_size = meta["vocab_size"]
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    with ExitStack() as stack:
        # What was checked is what is used: nobody can put another file in its place in between.
        files = {
            name: stack.enter_context(_checked_file(folder / name, expected, owners))
            for name, expected in meta["files"].items()
        }
        train, validation = (
            np.memmap(files[name], dtype=dtype, mode="r") for name in FILES.values()
        )
        saved = [files[name].read() for name in TOKENIZER_FILES]
        tokenizer = read_tokenizer(*saved, eos_id=meta["eos_id"])
    for name, ids in zip(FILES.values(), (train, validation), strict=True):
        highest = max(int(ids[i : i + BLOCK].max()) for i in range(0, ids.size, BLOCK))
        if highest >= vocab_size:
            raise _damaged(folder / name, f"holds id {highest}, vocabulary {vocab_size}")
    return Tokens(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_id=meta["eos_id"],
        bytes_per_token=meta["text_bytes"]["validation"] / validation.size,
        label=f"{corpus}{_skipped(meta['skipped_records'])}: {train.size:,} train and "
        f"{validation.size:,} validation tokens, vocabulary {vocab_size}",
        folder=folder,
        key=folder.name,
    )


def _skipped(records: Mapping[str, int]) -> str:
    if not records:
        return ""
    total = sum(records.values())
    reasons = "; ".join(f"{count} {reason}" for reason, count in records.items())
    return f", {total} record{'' if total == 1 else 's'} skipped ({reasons})"


def _read_meta(folder: Path, owners: Collection[int] | None) -> dict[str, Any]:
    path = folder / META
    with _reading(path), open_regular(path, owners=owners) as file:
        content = file.read()
    try:
        vouched = json.loads(content)
        meta: dict[str, Any] = vouched["meta"]
        whole = vouched["crc32"] == zlib.crc32(_canonical(meta))
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "is not what was written") from None
    if not whole:
        raise _damaged(path, "is not what was written (its crc32 differs)")
    if meta["format"] != FORMAT:
        raise _damaged(path, f"has format {meta['format']}, this version reads {FORMAT}")
    return meta


def _checked_file(
    path: Path, expected: Mapping[str, int], owners: Collection[int] | None
) -> FileIO:
    """The file, open at its beginning, if it holds what was written."""
    with ExitStack() as closing:
        with _reading(path):
            file = closing.enter_context(open_regular(path, owners=owners))
            found, value = os.fstat(file.fileno()).st_size, crc32_of(file)
            file.seek(0)
        if found != expected["bytes"]:
            raise _damaged(path, f"has {found} bytes, {expected['bytes']} were written")
        if value != expected["crc32"]:
            raise _damaged(path, "is not what was written (its crc32 differs)")
        closing.pop_all()  # it stays open
        return file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except ForeignOwnerError as error:
        raise _damaged(path, error.strerror or "belongs to another user") from None
    except PermissionError:
        raise DataError(
            f"The token cache {path.parent} is another user's, who lets nobody read {path.name}. "
            f"Have that user run `chmod -R a+rX {path.parent}`, or choose another folder with "
            "--data.cache_dir."
        ) from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def _damaged(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(
        f"The token cache is damaged: {path} {what}. Delete the folder {path.parent} and run "
        "again to build it anew."
    )


def _canonical(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, sort_keys=True).encode()
