"""What a run's folder holds of its model: enough to use it without the base model and the data.

model/config.json              the architecture, as Hugging Face writes it
model/generation_config.json   that of the base model, where it has one
tokenizer/...                  every file of the tokenizer

A run writes these once, before its first step. Each of its checkpoints names them with their
SHA-256, and only the bytes that were compared with it are used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picotron_core.data.tokenizer import TOKENIZER, TOKENIZER_CONFIG, Tokenizer
from picotron_core.data.tokenizer_files import LARGEST, read_files
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, DamagedFileError, RunError
from picotron_core.files import fsync, make_folder, open_regular, refuse_links, replace_bytes
from picotron_core.model.architecture import Architecture

CONFIG = "model/config.json"
GENERATION = "model/generation_config.json"
FOLDERS = ("model", "tokenizer")
log = logging.getLogger("picotron")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """files: by their names in the run's folder, "model/config.json" and so on.

    eos_id: the token that ends a document in training. ends: those that end a generated text.
    """

    files: Mapping[str, bytes]
    eos_id: int
    ends: tuple[int, ...]

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each, in hex."""
        return {name: hashlib.sha256(text).hexdigest() for name, text in sorted(self.files.items())}

    @property
    def architecture(self) -> Architecture:
        return Architecture.from_transformers(json.loads(self.files[CONFIG]))

    @property
    def generation_config(self) -> dict[str, Any]:
        """The values of generation_config.json; empty where the base model has none."""
        return dict(json.loads(self.files.get(GENERATION, b"{}")))

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by their names in a folder of Hugging Face's."""
        return {
            name.removeprefix("tokenizer/"): text
            for name, text in self.files.items()
            if name.startswith("tokenizer/")
        }

    @property
    def files_of_use(self) -> dict[str, bytes]:
        """What belongs into a model folder of Hugging Face's beside config.json and the weights."""
        files = self.tokenizer_files
        if GENERATION in self.files:
            files[GENERATION.removeprefix("model/")] = self.files[GENERATION]
        return files

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: ValueError."""
        return read_files(self.tokenizer_files, eos_id=self.eos_id)


def make_record(
    architecture: Architecture,
    tokenizer_files: Mapping[str, bytes],
    *,
    eos_id: int,
    ends: Sequence[int],
    generation_config: bytes | None = None,
) -> ModelRecord:
    """The record of a model.

    Args:
        tokenizer_files: as `data.tokenizer_files.tokenizer_files` returns them.
        generation_config: the content of the base model's generation_config.json.
    """
    described = json.dumps(architecture.to_transformers(), indent=2) + "\n"
    files = {CONFIG: described.encode()}
    if generation_config is not None:
        files[GENERATION] = generation_config
    files |= {f"tokenizer/{name}": text for name, text in tokenizer_files.items()}
    return ModelRecord(files, eos_id, tuple(ends))


def write_record(run: RunDirectory, record: ModelRecord) -> None:
    """Write the files of a new run, durably; no link in the folder is followed.

    Raises: RunError.
    """
    try:
        refuse_links(run.path, *FOLDERS)
        for name, text in record.files.items():
            path = run.path / name
            make_folder(path.parent)
            replace_bytes(path, text)
            fsync(path.parent)
    except OSError as error:
        raise RunError(f"Cannot write {run.path}: {error}.") from None


def read_record(
    run: RunDirectory, digests: Mapping[str, str], *, eos_id: int, ends: Sequence[int]
) -> ModelRecord:
    """The files that a checkpoint of the run names.

    Args:
        digests: the SHA-256 of each, from the checkpoint's manifest, as are the ids.

    Raises: DamagedFileError that names the file that is missing, or not what the run wrote.
    """
    for needed in (CONFIG, f"tokenizer/{TOKENIZER}", f"tokenizer/{TOKENIZER_CONFIG}"):
        if needed not in digests:
            raise DamagedFileError(f"The checkpoint in {run.path} does not name {needed}.")
    files = {name: _read(run, name, digests[name]) for name in digests}
    record = ModelRecord(files, eos_id, tuple(ends) or (eos_id,))
    _warn_of_others(run, digests)
    try:  # they are what was written, but this version may not compute such a model
        _ = record.architecture, record.generation_config, record.tokenizer
    except (ValueError, ConfigError) as error:
        raise DamagedFileError(f"{run.path} holds a model that cannot be used: {error}") from None
    return record


def read_architecture(run: RunDirectory) -> Architecture:
    """The architecture alone, not compared with any digest: enough to check a layout before any
    rank starts.

    Raises: DamagedFileError that names the file.
    """
    path = run.path / CONFIG
    try:
        return Architecture.from_transformers(json.loads(_content(run, CONFIG)))
    except (ValueError, ConfigError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedFileError(_damaged(path, f"it describes no model ({error})")) from None


def _read(run: RunDirectory, name: str, digest: str) -> bytes:
    content = _content(run, name)
    if hashlib.sha256(content).hexdigest() != digest:
        raise DamagedFileError(_damaged(run.path / name, "it is not what the run wrote (sha256)"))
    return content


def _content(run: RunDirectory, name: str) -> bytes:
    path = run.path / name
    try:
        refuse_links(run.path, *map(str, list(Path(name).parents)[:-1]), name)
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise DamagedFileError(_damaged(path, "it is missing")) from None
    except OSError as error:
        raise DamagedFileError(_damaged(path, str(error.strerror))) from None
    if content is None or len(content) > LARGEST:
        raise DamagedFileError(_damaged(path, f"it has more than {LARGEST >> 20} MB"))
    return content


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path} is damaged: {what}. Every checkpoint of the run needs this file as the run wrote "
        "it: restore it from a copy of the run's folder."
    )


def _warn_of_others(run: RunDirectory, digests: Mapping[str, str]) -> None:
    """A template that somebody laid beside the others must not look as if it were used."""
    for folder in FOLDERS:
        for path in sorted((run.path / folder).rglob("*")):
            name = path.relative_to(run.path).as_posix()
            if name not in digests and (path.is_symlink() or not path.is_dir()):
                log.warning("%s is not a file that the run wrote: it is not used.", path)
