"""The manifest: what makes a folder a checkpoint. Written last, it vouches for every other file."""

from __future__ import annotations

import json
import zlib
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from picotron_core.checkpoint.header import LIMIT, parse
from picotron_core.errors import DamagedFileError, RunError
from picotron_core.files import BLOCK, open_regular

MANIFEST = "manifest.json"
FORMAT = 2  # 1 had whole tensors in two files; it was never released

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
# Not any plain basename: only what a rank's file is called.
FileName = Annotated[str, StringConstraints(pattern=r"^rank-[0-9]{5,9}\.safetensors\z")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+-]{1,100}\z")]
Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,200}(/[A-Za-z0-9_.-]{1,200})?\z")
]
Said = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+ -]{0,100}\z")]
RunFile = Annotated[
    str,
    StringConstraints(
        pattern=r"^(tokenizer|model)(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){1,2}\z", max_length=200
    ),
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]
Dims = Annotated[list[Size], Field(max_length=8)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(Strict):
    bytes: Count
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


class Degrees(Strict):
    """The layout that wrote it. Informs: any other reads it."""

    dp: Size = 1
    pp: Size = 1
    cp: Size = 1
    tp: Size = 1
    zero: Count = 0

    def __str__(self) -> str:
        wide = [f"{name} {n}" for name, n in self.model_dump().items() if n > (name != "zero")]
        return ", ".join(wide) or "one rank"


class Backend(Strict):
    """Who served an op. Compared with who does now; never looked up, let alone imported."""

    op: Word
    backend: Name
    distribution: Name
    version: Word
    dtype: Word

    def __str__(self) -> str:
        return f"{self.backend} of {self.distribution} {self.version} in {self.dtype}"


class Scale(Strict):
    value: Annotated[float, Field(gt=0)]
    steps: Count
    skips: Count


class Facts(Strict):
    """What a run must find again, and what stays the same for all its checkpoints.

    data: the key of the token cache. global_batch: samples a step. seq_len: tokens a
    sample. config: as in config.toml.
    torch, device: its version and where it computed; "" where nobody said.
    dtype: the compute dtype; "" in checkpoints of earlier versions.
    ends: the ids that end a generated text.
    files: the files in the run's folder that describe its model, each with its SHA-256; empty in
    checkpoints of earlier versions. See `engine/model_record.py`.
    """

    data: Annotated[str, StringConstraints(max_length=200)]
    eos_id: Count
    seed: Count
    global_batch: Size
    seq_len: Size
    config: dict[str, Any] = Field(default_factory=dict)
    backends: list[Backend] = Field(default_factory=list)
    torch: Said = ""
    device: Said = ""
    dtype: Said = ""
    ends: Annotated[list[Count], Field(max_length=1000)] = Field(default_factory=list)
    files: Annotated[dict[RunFile, Sha256], Field(max_length=64)] = Field(default_factory=dict)


class Manifest(Strict):
    """samples: how many the run has had, the sampler's position. parameters: name -> whole shape.
    kinds: what is kept of each: the master, and the moments' names.
    """

    format: Literal[2] = 2
    step: Count
    tokens: Count
    samples: Count
    facts: Facts
    layout: Degrees
    loss_scale: Scale | None
    parameters: dict[str, Dims]
    kinds: list[Word]
    files: dict[FileName, FileEntry]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def skips(self) -> int:
        """Updates that float16 had skipped since the step."""
        return self.loss_scale.skips if self.loss_scale else 0


def encode(manifest: Manifest) -> bytes:
    """The manifest's file, with a checksum of its own.

    Raises: RunError for one that no reader would accept.
    """
    values = manifest.model_dump()
    vouched = {"manifest": values, "crc32": zlib.crc32(_canonical(values))}
    text = _text(vouched)
    if len(text) > LIMIT:
        raise RunError(f"The manifest of a checkpoint would take {len(text)} bytes, above {LIMIT}.")
    return text


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone: `verify` looks at the files that it vouches for.

    Raises: DamagedFileError that names the file.
    """
    path = folder / MANIFEST
    if folder.is_symlink():
        raise DamagedFileError(f"{folder} is a link, and no links are followed to a checkpoint.")
    try:
        with BufferedReader(open_regular(path)) as file:  # one read of the system may bring less
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError(f"more than {LIMIT} bytes")
        vouched = parse(text)
        values = vouched.get("manifest")
        if not isinstance(values, dict) or vouched.get("crc32") != zlib.crc32(_canonical(values)):
            raise ValueError("its crc32 differs")
        if text != _text(vouched):  # the crc32 is of what it says, and blind to the space between
            raise ValueError("it is not as it was written")
        if values.get("format") != FORMAT:
            raise ValueError(
                f"format {values.get('format')!r}, this Picotron reads {FORMAT}: a run saved by "
                "another version goes on with that version"
            )
        return Manifest.model_validate(values)
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:200]
        raise DamagedFileError(f"{path} is damaged ({key!a}: {first['msg']}).") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}).") from None


def verify(folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> None:
    """Compare every file, or this part of the files, with the manifest. All bytes are read.

    Raises: DamagedFileError that names the first that differs.
    """
    for number, (name, entry) in enumerate(sorted(manifest.files.items())):
        path = folder / name
        try:
            with open_regular(path) as file:
                found = _size(file)
                if found != entry.bytes:
                    raise DamagedFileError(
                        f"{path} is damaged: it has {found} bytes, not {entry.bytes}."
                    )
                if number % parts == part and _crc32(file) != entry.crc32:
                    raise DamagedFileError(f"{path} is damaged: its crc32 differs.")
        except OSError as error:
            raise DamagedFileError(
                f"{path}, named in the manifest, cannot be read ({error.strerror})."
            ) from None


def _size(file: FileIO) -> int:
    return file.seek(0, 2)


def _crc32(file: FileIO) -> int:
    file.seek(0)
    value = 0
    block = bytearray(BLOCK)
    while count := file.readinto(block):
        value = zlib.crc32(memoryview(block)[:count], value)
    return value


def _text(vouched: dict[str, Any]) -> bytes:
    return json.dumps(vouched, indent=1).encode()


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode()
