"""Tokenise once: the cache of token files, keyed by everything that decides their content.

A cache appears by one rename of a finished folder, so that a killed build leaves nothing that
could be taken for a whole one. `cache_folder` says whose entries count and what is swept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from os.path import lexists, realpath
from pathlib import Path

from picotron_core.data.cache_folder import (
    entry_of,
    new_folder,
    only_builder,
    protect,
    remove,
    sweep,
)
from picotron_core.data.corpus import Corpus
from picotron_core.data.pretrained_tokenizer import load_tokenizer
from picotron_core.data.split import Part, Split, parted, plan_split
from picotron_core.data.tokenizer import Tokenizer, train_tokenizer
from picotron_core.data.tokens import (
    FILES,
    FORMAT,
    META,
    TOKENIZER_FILES,
    Tokens,
    fit_tokens,
    open_tokens,
    token_dtype,
    write_meta,
)
from picotron_core.errors import DataError
from picotron_core.files import (
    create,
    fsync,
    make_folder,
    rename,
    trusted_owners,
    write_all,
)

log = logging.getLogger("picotron")
__all__ = ["Progress", "Tokens", "open_tokens", "prepare", "token_dtype"]

# (stage, bytes done, bytes in all; 0 in all: not known)
Progress = Callable[[str, int, int], None]

WAITING = "waiting for another process to tokenise"
PIECE_CHARS = 1 << 19  # a longer document is encoded in pieces, on many cores
BATCH_CHARS = 1 << 22  # text in flight; a token in flight costs the encoder some 100 bytes
TRAINING_BYTES = 1 << 26  # text that a tokenizer is trained on, at most


def prepare(
    corpus: Corpus,
    *,
    tokenizer: str,
    vocab_size: int,
    val_fraction: float,
    cache_dir: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tokens:
    """The corpus as tokens: from the cache if it is there, else tokenised into it.

    Any number of processes may ask at once: one builds, the rest wait and open what it built.

    Args:
        tokenizer: a Hugging Face tokenizer (folder or hub name), or "" to train a byte-level BPE
            of `vocab_size` on the training text (on a sample of some 64 MB where it is longer).
        val_fraction: the share held out, see `plan_split`.
        cache_dir: the folder of caches; made if it is not there.
        seed: of the choice of documents to hold out.
        progress: called now and then with the stage, bytes of text done, and bytes in all.

    Raises: DataError if there is too little text or the folder cannot be written,
        DamagedFileError if the cache is there but not whole, ConfigError for the tokenizer.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    spec = ["bpe", vocab_size] if loaded is None else [loaded.fingerprint, loaded.vocab_size]
    token_dtype(loaded.vocab_size if loaded else vocab_size)  # refuse before any work
    parts = [FORMAT, corpus.fingerprint(), *spec, val_fraction, seed]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    cache_dir = Path(realpath(cache_dir.expanduser()))  # what is in it may not be a link
    try:
        make_folder(cache_dir)
        while not lexists(folder := entry_of(cache_dir, key)):
            with only_builder(folder.parent, key, lambda: report(WAITING, 0, 0)) as alone:
                if alone:
                    sweep(folder.parent, key)
                if entry_of(cache_dir, key) == folder and not lexists(folder):
                    _build(corpus, loaded, vocab_size, val_fraction, seed, folder, report)
                # Else another process built it meanwhile, or another user, who may not be trusted.
        if folder.parent != cache_dir:
            log.warning(
                "%s belongs to a user who is neither you, root nor the owner of that folder: using "
                "%s instead",
                *(cache_dir / key, folder),
            )
    except OSError as error:
        raise DataError(
            f"Cannot write the token cache in {cache_dir}: {error.strerror or error}. Free or "
            "unlock that disk, or choose another folder with --data.cache_dir."
        ) from error
    return open_tokens(folder, owners=trusted_owners(cache_dir))


def _build(
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    folder: Path,
    report: Progress,
) -> None:
    making = new_folder(folder)
    try:
        split = plan_split(
            corpus.documents(),
            val_fraction=val_fraction,
            seed=seed,
            progress=lambda done: report("reading", done, 0),
        )
        if tokenizer is None:
            text, text_bytes = _training_text(corpus, split)
            tokenizer = train_tokenizer(
                text,
                vocab_size=vocab_size,
                on_progress=lambda done: report("training the tokenizer", done, text_bytes),
            )
        tokenizer.save(making)
        text_bytes_of = _write_tokens(corpus, tokenizer, split, making, report)
        write_meta(making, tokenizer=tokenizer, text_bytes=text_bytes_of, label=corpus.label)
        protect(making)
        # The files before the rename, the rename before anybody counts on it: a power cut
        # leaves a whole cache or none.
        for name in (*FILES.values(), *TOKENIZER_FILES, META):
            fsync(making / name)
        fsync(making)
        try:
            rename(making, folder)
        except OSError:
            if not folder.exists():  # else a builder that no lock reaches was first: as good
                raise
        fsync(folder.parent)
    finally:
        remove(making)


def _training_text(corpus: Corpus, split: Split) -> tuple[Iterator[str], int]:
    """Text of the training side, some TRAINING_BYTES spread evenly over it, and its length."""
    share = 1 - split.val_fraction if split.cut is None else split.cut / split.total_bytes
    train_bytes = max(round(split.total_bytes * share), 1)
    stride = max(train_bytes // TRAINING_BYTES, 1)
    pieces = (
        piece
        for part, text in parted(corpus.documents(), split)
        if part == "train"
        for piece, _ in _pieces(text)
    )
    every = (piece for number, piece in enumerate(pieces) if number % stride == 0)
    return every, train_bytes // stride


def _write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, split: Split, making: Path, report: Progress
) -> dict[Part, int]:
    """Write both token files; returns the bytes of text in each."""
    text_bytes: dict[Part, int] = {"train": 0, "validation": 0}
    vocab_size, bos, eos = tokenizer.vocab_size, tokenizer.prefix, [tokenizer.eos_id]
    first = True  # whether the piece begins its document
    with ExitStack() as stack:
        files = {part: stack.enter_context(create(making / name)) for part, name in FILES.items()}
        for batch in _batches(parted(corpus.documents(), split)):
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (part, piece, last), ids in zip(batch, encoded, strict=True):
                ids = (bos if first else []) + ids + (eos if last else [])
                write_all(files[part], fit_tokens(ids, vocab_size).data)
                first = last
                text_bytes[part] += len(piece.encode())
            report("tokenising", sum(text_bytes.values()), split.total_bytes)
    if not all(text_bytes.values()):
        raise DataError(
            f"The corpus, {corpus.label}, is too short to hold out {split.val_fraction:.2%} of it "
            "for validation. Give more text with --data.paths."
        )
    return text_bytes


def _batches(
    documents: Iterable[tuple[Part, str]],
) -> Iterator[list[tuple[Part, str, bool]]]:
    """(side, piece, whether it ends its document) in batches of BATCH_CHARS or a little more."""
    batch: list[tuple[Part, str, bool]] = []
    waiting = 0
    for part, text in documents:
        for piece, last in _pieces(text):
            batch.append((part, piece, last))
            waiting += len(piece)
            if waiting >= BATCH_CHARS:
                yield batch
                batch, waiting = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a long text after a line end, or where it has none, after PIECE_CHARS."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1
        end = end if end > start else start + PIECE_CHARS
        yield text[start:end], False
        start = end
    yield text[start:], True
