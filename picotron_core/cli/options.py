"""Options that several commands share, and how settings are read from a command's words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from picotron_core.errors import ConfigError

# Settings (--train.steps 200) are no options of typer's: `split` reads them from the rest.
WITH_SETTINGS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
SETTINGS_HELP = "Every setting is a flag: --train.steps 200. `picotron config` lists them all."

# Each rank is a process that imports torch: more only fight for the cores and the memory.
MOST_RANKS = max(64, 4 * (os.cpu_count() or 1))

Backends = Annotated[
    str, typer.Option(help="Backends by op: 'attention=sdpa,mem_efficient;*=auto', or one name.")
]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, or a card to simulate (t4, p100@cu130): --run.device."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Enable an installed plugin; may be repeated."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Text files, a folder, JSONL, Parquet or a dataset name; repeatable."),
]


def shorthands(
    plugins: Sequence[str] | None, device: str, data: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """The settings that short options stand for.

    Raises: ConfigError for a name of nothing, as an unset variable of a shell gives: the setting
        would be as if it were not given.
    """
    for flag, names in (("--plugin", plugins), ("--data", data)):
        if "" in (names or ()):
            raise ConfigError(f"{flag} is empty: give a name, or leave it out.")
    found = [("plugins.enable", name) for name in plugins or ()]
    found += [("run.device", device)] if device else []
    return found + [("data.paths", path) for path in data or ()]


def split(rest: Sequence[str] | None) -> tuple[list[Path], list[tuple[str, str]]]:
    """Arguments that are no options of typer's -> the config files and the settings."""
    paths = []
    overrides = []
    words = iter(rest or ())
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given = value if equals else next(words, None)
            if given is None:
                raise ConfigError(f"--{key} needs a value: --{key} VALUE.")
            overrides.append((key, given))
        elif word.endswith(".toml"):
            paths.append(Path(word))
        else:
            raise ConfigError(
                f"{word!r} is no .toml config. For several data files repeat the flag: "
                "--data FILE --data FILE, or name their folder."
            )
    return paths, overrides
