"""The tokens of a job: from its text, or for a run that goes on, from the cache of what it read."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from picotron_core.checkpoint.manifest import Facts
from picotron_core.cli.paths import is_same
from picotron_core.data.corpus import open_corpus
from picotron_core.data.loader import num_windows
from picotron_core.data.token_cache import Progress, open_cached, prepare
from picotron_core.data.tokenizer import Tokenizer
from picotron_core.data.tokens import Tokens
from picotron_core.errors import DamagedFileError, DataError
from picotron_core.schema import Config

# What of [data] decides the tokens, beside the paths.
DECIDING = ("text_field", "split", "on_bad", "vocab_size", "val_fraction")
log = logging.getLogger("picotron")


def prepare_tokens(
    config: Config,
    tokenizer: str | Tokenizer,
    progress: Progress | None,
    facts: Facts | None = None,
    *,
    ranks: int,
) -> Tokens:
    """The tokens to train on.

    Args:
        tokenizer: as for `prepare`.
        facts: of the checkpoint to go on from. Where the text that it was trained on cannot be read
            again, the token cache of it is enough.
        ranks: how many of the job there are.

    Raises: DataError that names the path that is missing; see also `prepare`.
    """
    data = config.data
    cache_dir = Path(data.cache_dir).expanduser()
    unreadable = _unreadable(data.paths) if facts and _is_as_recorded(config, facts) else ""
    tokens = None
    if facts and unreadable:
        tokens = _from_cache(unreadable, cache_dir, facts.data)
    if tokens is None:
        tokens = prepare(
            open_corpus(
                data.paths,
                text_field=data.text_field,
                split=data.split,
                on_bad=data.on_bad,
                cache_dir=cache_dir,
                ranks=ranks,
            ),
            tokenizer=tokenizer,
            vocab_size=data.vocab_size,
            val_fraction=data.val_fraction,
            cache_dir=cache_dir,
            progress=progress,
        )
    for ids in (tokens.train, tokens.validation):  # now, not at the first evaluation
        num_windows(ids, data.seq_len)
    return tokens


def _is_as_recorded(config: Config, facts: Facts) -> bool:
    """Whether the settings name the text of the checkpoint: other paths are the user's wish, and no
    cache may stand in for them.
    """
    recorded = facts.config.get("data") or {}
    now = config.data.model_dump(mode="json")
    paths = recorded.get("paths") or []
    return (
        len(config.data.paths) == len(paths)
        and all(map(is_same, config.data.paths, paths))
        and is_same(config.data.tokenizer, recorded.get("tokenizer") or "")
        and all(now[key] == recorded.get(key) for key in DECIDING)
    )


def _unreadable(paths: Sequence[str]) -> str:
    """The first path that cannot be read a second time: nothing is there, or it is a stream."""
    for path in paths:
        try:
            mode = os.stat(Path(path).expanduser()).st_mode
        except (OSError, ValueError):
            return path
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return path
    return ""


def _from_cache(path: str, cache_dir: Path, key: str) -> Tokens | None:
    """The cached tokens of a text that cannot be read again; None where the hub may give it."""
    try:
        tokens = open_cached(cache_dir, key, path)
    except DamagedFileError as error:
        raise DataError(
            f"{error} That needs the text, but data.paths names {path}, which cannot be read "
            "again: give it with --data PATH."
        ) from None
    if tokens:
        log.info("%s cannot be read again: using its tokens in %s", path, tokens.folder)
        return tokens
    if not os.path.isabs(path) and path != "-":
        return None
    raise DataError(
        f"data.paths names {path}, which cannot be read again, and {cache_dir} holds no tokens of "
        f"it ({key}). Give the text with --data PATH, or the folder of the token cache with "
        "--data.cache_dir."
    )
