"""Tokenise once: the cache of token files, keyed by everything that decides their content.

A cache appears by one rename of a finished folder, so that a killed build leaves nothing that
could be taken for a whole one. `cache_folder` says whose entries count and what is swept.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from os.path import lexists, realpath
from pathlib import Path

from picotron_core.data.cache_folder import (
    entry_of,
    only_builder,
    protect,
    remove,
    start_entry,
    sweep,
)
from picotron_core.data.corpus import Corpus
from picotron_core.data.interruptible import interruptible
from picotron_core.data.pieces import Piece, batches, for_training
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
from picotron_core.data.training_text import frequent_words, only_words, sampled
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
TRAINING_BYTES = 256_000_000  # text that a tokenizer is trained on, at most
FEW_BYTES = 1_000_000  # whose words fit into memory whatever they are


def prepare(
    corpus: Corpus,
    *,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    val_fraction: float,
    cache_dir: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tokens:
    """The corpus as tokens: from the cache if it is there, else tokenised into it.

    Any number of processes may ask at once: one builds, the rest wait and open what it built.

    Args:
        tokenizer: one that is loaded, the folder or hub name of one, or "" to train a byte-level
            BPE of `vocab_size` on the training text (of a longer one, on an evenly spread sample of
            256 MB).
        val_fraction: the share held out, see `plan_split`.
        cache_dir: the folder of caches; made if it is not there.
        seed: of the choice of documents to hold out.
        progress: called now and then with the stage, bytes of text done, and bytes in all.

    Raises: DataError if there is too little text or the folder cannot be written,
        DamagedFileError if the cache is there but not whole, ConfigError for the tokenizer.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    if isinstance(tokenizer, str):
        loaded = load_tokenizer(tokenizer) if tokenizer else None
    else:
        loaded = tokenizer
    spec = ["bpe", vocab_size] if loaded is None else [loaded.fingerprint, loaded.vocab_size]
    token_dtype(loaded.vocab_size if loaded else vocab_size)  # refuse before any work
    held_out = "given" if corpus.validation else val_fraction
    parts = [FORMAT, corpus.fingerprint(), *spec, held_out, seed]
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
    return open_tokens(folder, corpus.label, key=key, owners=trusted_owners(cache_dir))


def open_cached(cache_dir: Path, key: str, label: str) -> Tokens | None:
    """The tokens that `prepare` made under this key before; None where they are not in the cache.

    Args:
        label: what the text is called in the log.

    Raises: DamagedFileError where they are there but not whole; DataError where the name is taken.
    """
    cache_dir = Path(realpath(cache_dir.expanduser()))
    if not re.fullmatch(r"[0-9a-f]{32}", key) or not cache_dir.is_dir():
        return None
    folder = entry_of(cache_dir, key)
    if not lexists(folder):
        return None
    return open_tokens(folder, label, key=key, owners=trusted_owners(cache_dir))


def _build(
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    folder: Path,
    report: Progress,
) -> None:
    making = start_entry(folder)
    try:
        skipped: Counter[str] = Counter()
        split = plan_split(
            corpus.fragments(skipped=skipped),
            val_fraction=val_fraction,
            seed=seed,
            progress=lambda done: report("reading", done, 0),
            validation=corpus.fragments("validation", skipped=skipped) if corpus.validation else (),
        )
        if tokenizer is None:
            tokenizer = _trained(corpus, split, vocab_size, report)
        tokenizer.save(making)
        text_bytes_of = _write_tokens(corpus, tokenizer, split, making, report)
        write_meta(
            making,
            tokenizer=tokenizer,
            text_bytes=text_bytes_of,
            skipped=skipped,
            key=folder.name,
        )
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


def _text(corpus: Corpus, split: Split) -> Iterator[Piece]:
    """All text, with the side that it is on."""
    validation = corpus.fragments("validation") if corpus.validation else ()
    return parted(chain(corpus.fragments(), validation), split)


def _trained(corpus: Corpus, split: Split, vocab_size: int, report: Progress) -> Tokenizer:
    """A tokenizer of the training side: of a sample, and of the most frequent words, where all
    would take memory without bound.
    """
    share = 1 - split.val_fraction if split.cut is None else split.cut / split.total_bytes
    train_bytes = max(round(split.total_bytes * share), 1)
    keep = min(TRAINING_BYTES / train_bytes, 1.0)
    text_bytes = round(keep * train_bytes)
    if keep < 1:
        log.info(
            "The tokenizer is trained on an evenly spread sample of %.1f MB of the %.1f MB of "
            "training text.",
            text_bytes / 1e6,
            train_bytes / 1e6,
        )

    def sample(stage: str) -> Iterator[str]:
        done = 0
        for piece in sampled(for_training(_text(corpus, split)), keep=keep, seed=split.seed):
            yield piece
            done += len(piece.encode())
            report(stage, done, text_bytes)

    words, dropped = None, 0
    if text_bytes > FEW_BYTES:
        words, dropped = frequent_words(sample("counting words"))
    text = sample("training the tokenizer")
    if words is not None:
        log.info(
            "The tokenizer is trained on the %d most frequent words; %d rarer ones or more would "
            "not fit into the memory that it may take.",
            len(words),
            dropped,
        )
        text = only_words(text, words)
    tokenizer = train_tokenizer(text, vocab_size=vocab_size)
    _return_freed_memory()
    return tokenizer


def _return_freed_memory() -> None:
    """Give the system back what the trainer freed, which the C library would keep otherwise: the
    encoder could not use it, and would take as much again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, split: Split, making: Path, report: Progress
) -> dict[Part, int]:
    """Write both token files; returns the bytes of text in each."""
    text_bytes: dict[Part, int] = {"train": 0, "validation": 0}
    vocab_size, bos, eos = tokenizer.vocab_size, tokenizer.prefix, [tokenizer.eos_id]
    begins = dict.fromkeys(FILES, True)  # whether the next piece of a side begins a document
    with ExitStack() as stack:
        files = {part: stack.enter_context(create(making / name)) for part, name in FILES.items()}
        for batch in batches(_text(corpus, split)):
            texts = [text for _, text, _ in batch]
            encoded = interruptible(partial(tokenizer.encode_batch, texts))
            for (part, text, last), ids in zip(batch, encoded, strict=True):
                ids = (bos if begins[part] else []) + ids + (eos if last else [])
                write_all(files[part], fit_tokens(ids, vocab_size).data)
                begins[part] = last
                text_bytes[part] += len(text.encode())
            report("tokenising", sum(text_bytes.values()), split.total_bytes)
    if not all(text_bytes.values()):
        raise DataError(
            f"The corpus, {corpus.label}, is too short to hold out {split.val_fraction:.2%} of it "
            "for validation. Give more text with --data.paths."
        )
    return text_bytes
