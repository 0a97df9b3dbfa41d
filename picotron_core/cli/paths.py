"""Paths as a run writes them down: the same from every working folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from picotron_core.engine.run_directory import RunDirectory
from picotron_core.schema import Config


def recorded(config: Config, run: RunDirectory) -> Config:
    """The config as the run writes it down: paths that hold anywhere, and where the run lies now,
    which after a move is not where it was made.
    """
    path = run.path.absolute()
    here = config.run.model_copy(update={"name": path.name, "dir": str(path.parent)})
    return with_absolute_paths(config.model_copy(update={"run": here}))


def with_absolute_paths(config: Config) -> Config:
    """The config with every path of this machine made absolute. Names of the hub, "-" and whatever
    else is not a file here stay as they are.
    """
    model = config.model.model_copy(update={"path": _if_there(config.model.path)})
    data = config.data.model_copy(
        update={
            "paths": absolute_paths(config.data.paths),
            "tokenizer": _if_there(config.data.tokenizer),
            "cache_dir": _absolute(config.data.cache_dir),
        }
    )
    run = config.run.model_copy(update={"dir": _absolute(config.run.dir)})
    return config.model_copy(update={"model": model, "data": data, "run": run})


def absolute_paths(paths: Iterable[str]) -> list[str]:
    """The same for `data.paths`."""
    return [_if_there(path) for path in paths]


def _if_there(path: str) -> str:
    """A name of the hub may look like a path: it is one if something lies there, or if nothing but
    a path is written so.
    """
    written_so = path.startswith(("~", "./", "../"))
    return _absolute(path) if path and (written_so or os.path.lexists(path)) else path


def _absolute(path: str) -> str:
    # Not `resolve`: a link that is pointed elsewhere, or /dev/stdin, must keep its meaning.
    return os.path.abspath(Path(path).expanduser())
