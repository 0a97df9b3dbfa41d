"""Paths: of the run that a command was given, and as a run writes them down."""

from __future__ import annotations

import os
from pathlib import Path

from picotron_core.checkpoint.commit import CHECKPOINTS, is_checkpoint
from picotron_core.config import expanded
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
            "paths": [_if_there(path) for path in config.data.paths],
            "tokenizer": _if_there(config.data.tokenizer),
            "cache_dir": _absolute(config.data.cache_dir),
        }
    )
    run = config.run.model_copy(update={"dir": _absolute(config.run.dir)})
    return config.model_copy(update={"model": model, "data": data, "run": run})


def is_same(given: str, other: str) -> bool:
    """Whether a setting names the same place as another, which may be written as an absolute path.
    Nothing need be there any more.
    """
    return given == other or bool(given and other and _absolute(given) == _absolute(other))


def _if_there(path: str) -> str:
    """A name of the hub may look like a path: it is one if something lies there, or if nothing but
    a path is written so.
    """
    written_so = path.startswith(("~", "./", "../"))
    return _absolute(path) if path and (written_so or os.path.lexists(path)) else path


def _absolute(path: str) -> str:
    # Not `resolve`: a link that is pointed elsewhere, or /dev/stdin, must keep its meaning.
    return os.path.abspath(Path(path).expanduser())


def located(given: Path | str) -> tuple[Path, Path]:
    """The folder of a run, and what was given of it: the folder itself, or one of its checkpoints.

    A path is made absolute only where its own words do not say what it is: ".", "..", a name alone,
    or a link. Otherwise it stays as it was given, for messages to show. Whether anything is there
    is not looked at.
    """
    given = expanded(given, what="the run")
    if ".." in given.parts or len(given.parts) < 2 or given.is_symlink():
        absolute = Path(os.path.abspath(given))
        # A link among a run's checkpoints is not followed: it is refused where it is read.
        among_others = given.is_symlink() and absolute.parent.name == CHECKPOINTS
        given = absolute if among_others else Path(os.path.realpath(given))
    if given.name == CHECKPOINTS and not (given / "config.toml").exists():
        given = given.parent
    if not is_checkpoint(given):
        return given, given
    run = given.parent.parent
    if run.is_symlink():
        run = Path(os.path.realpath(run))
    return run, run / CHECKPOINTS / given.name
