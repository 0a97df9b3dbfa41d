"""The run directory: `runs/<name>/`, which says what ran, on what, and how it went."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from picotron_core import files
from picotron_core.bounds import is_plain_name
from picotron_core.errors import ConfigError, RunError
from picotron_core.files import fsync, new_folder, replace_text
from picotron_core.hardware import Device
from picotron_core.registry import Selection
from picotron_core.schema import Config

DEPENDENCIES = ("torch", "transformers", "tokenizers", "safetensors", "pluggy", "numpy", "picotron")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def traces(self) -> Path:
        return self.path / "trace"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"


def create(parent: Path, name: str, *, again: bool = False) -> RunDirectory:
    """Make a new folder for a run: `name`, or `name-2` and so on, for a run is never overwritten.

    Args:
        again: take the folder of this name where there is one: an earlier start of the same run.

    Raises: RunError where it cannot be written.
    """
    name = name or time.strftime("%Y%m%d-%H%M%S")
    if not is_plain_name(name):
        raise ConfigError(
            f"run.name = {name!r} must be a plain folder name; run.dir is its parent."
        )
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            new_folder(path)
            return RunDirectory(path)
        except FileExistsError:
            if again and path.is_dir():
                return RunDirectory(path)
            if not parent.is_dir():
                raise RunError(
                    f"run.dir = {str(parent)!r} is not a folder. Give another."
                ) from None
            number += 1
        except OSError as error:
            raise RunError(
                f"Cannot make the run directory {path}: {error.strerror}. "
                "Give a folder that you can write to with --run.dir."
            ) from None


def refuse_links(run: RunDirectory) -> None:
    """Check that no folder in a run's folder is a link: what is written and removed there would be
    elsewhere. A run's folder may have come from somebody else.

    Raises: ConfigError that names the first link.
    """
    try:
        files.refuse_links(run.path, "checkpoints", "tokenizer", "trace", "model")
    except OSError as error:
        raise ConfigError(
            f"{error.filename} {error.strerror}. Put the folder itself in its place, or move the "
            "whole run and link to that."
        ) from None


def describe(
    run: RunDirectory, config: Config, selections: Sequence[Selection], device: Device
) -> None:
    """Write down what runs: config.toml, backends.json, environment.json."""
    values = config.model_dump(exclude_none=True)
    backends = [selection_record(selection) for selection in selections]
    with _or_run_error(run.path):
        replace_text(run.config, tomli_w.dumps(values))
        replace_text(run.path / "backends.json", json.dumps(backends, indent=2) + "\n")
        environment = json.dumps(environment_record(device), indent=2)
        replace_text(run.path / "environment.json", environment + "\n")


def make_durable(run: RunDirectory) -> None:
    """Once, before the first step: a checkpoint that survives a power cut is worth little without
    the config and the model record that belong to it. The files themselves are on the disk
    already; this does the same for the entries of the folders they are in.
    """
    with _or_run_error(run.path):
        for folder in (run.tokenizer, run.model, run.path, run.path.parent):
            fsync(folder)


def selection_record(selection: Selection) -> dict[str, Any]:
    """A selection as plain data: who was chosen, who decided, who was refused and why."""
    chosen = selection.chosen
    return {
        "op": selection.op,
        "backend": chosen.qualified_name,
        "distribution": chosen.provider.distribution,
        "version": chosen.provider.version,
        "source": selection.source,
        "asked": list(selection.asked),
        "dtype": selection.requests[0].dtype,
        "refused": {
            verdict.candidate.qualified_name: [
                {"code": reason.code, "detail": reason.detail, "fix": reason.fix}
                for reason in verdict.reasons
            ]
            for verdict in selection.refused
        },
    }


def environment_record(device: Device) -> dict[str, Any]:
    """The machine and the software of a run."""
    import torch

    return {
        "device": asdict(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in DEPENDENCIES},
        "cuda": torch.version.cuda,
        "command": sys.argv,
    }


@contextmanager
def _or_run_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write {path}: {error.strerror}. Free space, or make it writable, then go on "
            "with --resume."
        ) from None
