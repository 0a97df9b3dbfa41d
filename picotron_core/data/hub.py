"""A dataset of the Hugging Face hub as a source of documents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from picotron_core.data.records import OnBad, Record, documents_of, without_field
from picotron_core.data.sources import Fragment, Source
from picotron_core.errors import DataError, reason


def source_of(name: str, *, text_field: str, split: str, on_bad: OnBad) -> Source:
    """One split of a dataset; needs the `data` extra and, the first time, a network.

    Raises: DataError if it cannot be loaded, or has no such column.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:  # the library and the hub raise dozens of kinds
        raise DataError(
            f"No path {name} here, and the dataset {name!r} (split {split!r}) cannot be loaded: "
            f"{reason(error)}. Check --data.paths and --data.split."
        ) from error
    if text_field not in rows.column_names:
        bad = without_field(f"dataset {name!r}", text_field, rows.column_names)
        raise DataError(f"{bad.message}. {bad.advice}")
    read = partial(_fragments, rows, name, text_field, on_bad)
    digest = hashlib.sha256(on_bad.encode())
    size = 0
    for text, _ in read(Counter()):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
        size += len(encoded)
    return Source(fragments=read, digest=digest.hexdigest(), size_bytes=size)


def _fragments(
    rows: Any, name: str, text_field: str, on_bad: OnBad, skipped: Counter[str]
) -> Iterator[Fragment]:
    records = _records(rows, name, text_field)
    for text in documents_of(records, text_field=text_field, on_bad=on_bad, skipped=skipped):
        if text.strip():
            yield text, True


def _records(rows: Any, name: str, text_field: str) -> Iterator[Record]:
    for number, row in enumerate(rows.select_columns([text_field])):
        yield f"dataset {name!r}, row {number}", row
