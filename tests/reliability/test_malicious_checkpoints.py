"""A checkpoint from anywhere: all but plain numbers in their place is refused, in little memory.

Every one of these is vouched for by its manifest's checksums, as an attacker's would be.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import pytest
import torch
from small_state import save_at

from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.engine.peak import reset_peak
from picotron_core.errors import DamagedFileError

KEY = "master.weight"
SECOND = "rank-00001.safetensors"
KINDS = ("master", "exp_avg", "exp_avg_sq")


def in_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        manifest = forge.manifest_of(folder)
        change(manifest)
        forge.write_manifest(folder, manifest)

    return make


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        header, numbers = forge.header_of((folder / forge.FILE).read_bytes())
        changed = change(header)
        forge.write_file(folder, forge.with_header(changed or header, numbers))

    return make


def in_pieces(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def of_header(header: dict[str, Any]) -> None:
        pieces = json.loads(header["__metadata__"]["pieces"])
        change(pieces)
        header["__metadata__"]["pieces"] = json.dumps(pieces)

    return in_header(of_header)


def named(name: str) -> Callable[[Path], None]:
    """The manifest calls the file by another name; there is one of that name, where it can be."""

    def make(folder: Path) -> None:
        manifest = forge.manifest_of(folder)
        manifest["files"] = {name: manifest["files"].pop(forge.FILE)}
        if "\0" not in name and len(name) < 200:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / forge.FILE, target)
        forge.write_manifest(folder, manifest)

    return make


def content(text: bytes) -> Callable[[Path], None]:
    """A second file: the first has all the tensors' bytes."""
    return lambda folder: forge.write_file(folder, text, SECOND)


class Command:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def a_link(folder: Path) -> None:
    (folder / forge.FILE).rename(folder.parent / "elsewhere")
    (folder / forge.FILE).symlink_to(folder.parent / "elsewhere")


def a_linked_manifest(folder: Path) -> None:
    (folder / forge.MANIFEST).rename(folder.parent / "elsewhere.json")
    (folder / forge.MANIFEST).symlink_to(folder.parent / "elsewhere.json")


def a_linked_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def a_device(folder: Path) -> None:
    (folder / forge.FILE).unlink()
    (folder / forge.FILE).symlink_to("/dev/zero")


def a_pipe(folder: Path) -> None:
    (folder / forge.FILE).unlink()
    os.mkfifo(folder / forge.FILE)


def a_second_file(folder: Path) -> None:
    """The same numbers from two files: which are right?"""
    forge.write_file(folder, (folder / forge.FILE).read_bytes(), SECOND)


def one_file_as_many(folder: Path) -> None:
    """400 ranks' files that are one on the disk: no header is large, all together are."""
    names = [f"{number:060d}" for number in range(1000)]
    pieces = json.dumps({name: [1, 0, 1, 1, 0, 1] for name in names})
    header: dict[str, Any] = {"__metadata__": {"pieces": pieces}}
    for number, key in enumerate(f"{kind}.{name}" for kind in KINDS for name in names):
        offsets = [4 * number, 4 * number + 4]
        header[key] = {"dtype": "F32", "shape": [1], "data_offsets": offsets}
    manifest = forge.manifest_of(folder)
    manifest["parameters"] = {name: [1] for name in names}
    forge.write_manifest(folder, manifest)
    forge.write_file(folder, forge.with_header(header, bytes(12 * len(names))))
    manifest = forge.manifest_of(folder)
    for rank in range(1, 400):
        name = f"rank-{rank:05d}.safetensors"
        (folder / name).hardlink_to(folder / forge.FILE)
        manifest["files"][name] = manifest["files"][forge.FILE]
    forge.write_manifest(folder, manifest)


def a_sparse_file(folder: Path) -> None:
    """Gigabytes without a byte on the disk, for a tensor that the manifest says is larger."""
    header = {
        "__metadata__": {"pieces": json.dumps({"weight": [10**12, 0, 10**12, 10**12, 0, 10**12]})},
        KEY: {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]},
    }
    manifest = forge.manifest_of(folder)
    manifest["parameters"] = {"weight": [10**12]}
    text = json.dumps(header).encode()
    (folder / forge.FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / forge.FILE, 8 + len(text) + 4 * 10**9)
    manifest["files"][forge.FILE]["bytes"] = 8 + len(text) + 4 * 10**9
    forge.write_manifest(folder, manifest)


def a_manifest(text: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / forge.MANIFEST).write_bytes(text)

    return make


def a_backend(name: str) -> Callable[[Path], None]:
    entry = {"op": "attention", "backend": name, "distribution": "x", "version": "1"}
    return in_manifest(lambda m: m["facts"].update(backends=[{**entry, "dtype": "float32"}]))


def overlap(header: dict[str, Any]) -> None:
    header["exp_avg.weight"]["data_offsets"] = header[KEY]["data_offsets"]


def only_masters(folder: Path) -> None:
    """Whole and sound, but for a model that is not trained."""
    header, numbers = forge.header_of((folder / forge.FILE).read_bytes())
    for kind in KINDS[1:]:
        del header[f"{kind}.weight"]
    forge.write_file(folder, forge.with_header(header, numbers[: len(numbers) // 3]))
    in_manifest(lambda m: m.update(kinds=["master"]))(folder)


def gap(header: dict[str, Any]) -> None:
    for entry in (header["exp_avg.weight"], header["exp_avg_sq.weight"]):
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


BIG = b"[" + b"[]," * 200_000 + b"[]]"

BAD_NAME = "[key]': String should match pattern '^rank-"
# What the error must say, and how the checkpoint is made.
EVIL: dict[str, tuple[str, Callable[[Path], None]]] = {
    "path upwards": (BAD_NAME, named("../escaped.safetensors")),
    "absolute path": (BAD_NAME, named("/tmp/rank-00000.safetensors")),
    "path below": (BAD_NAME, named("sub/rank-00000.safetensors")),
    "drive letter": (BAD_NAME, named("C:rank-00000.safetensors")),
    "backslashes": (BAD_NAME, named("..\\rank-00000.safetensors")),
    "NUL in a name": (BAD_NAME, named("rank-00000.safetensors\0.txt")),
    "newline in a name": (BAD_NAME, named("rank-00000.safetensors\n")),
    "the manifest as a file": (BAD_NAME, named("manifest.json")),
    "endless name": (
        "manifest.json is damaged ('files.rank-000",
        named("rank-" + "0" * 300 + ".safetensors"),
    ),
    "link to a file": ("is a link, and links are not followed", a_link),
    "link to the manifest": ("is a link, and links are not followed", a_linked_manifest),
    "link to the folder": ("is a link, and no links are followed", a_linked_folder),
    "link to a device": ("is a link, and links are not followed", a_device),
    "pipe": ("not a plain file", a_pipe),
    "sparse file of gigabytes": ("bytes for tensors of 12000000000000", a_sparse_file),
    "header longer than the file": (
        "a header of 1099511627776 bytes in a file of",
        content((1 << 40).to_bytes(8, "little") + b"{}"),
    ),
    "negative header": (
        "a header of 18446744073709551615 bytes in a file of",
        content(b"\xff" * 8 + b"{}"),
    ),
    "header of a megabyte and more": (
        "a header of 1048578 bytes in a file of",
        in_header(lambda h: b" " * (1 << 20) + b"{}"),
    ),
    "header cut off": ("it ends in its header", content(b"\x10\0")),
    "empty file": ("it ends in its header", content(b"")),
    "header that is no JSON": ("can't decode byte 0x80", in_header(lambda h: b"\x80\x04K\x01.")),
    "header that is a list": ("no JSON object", in_header(lambda h: BIG)),
    "header of brackets": ("nested too deeply", in_header(lambda h: b"[" * 100_000)),
    "header with a key twice": (
        "a key is there twice",
        in_header(
            lambda h: json.dumps(h).encode().replace(b'"exp_avg.weight"', b'"master.weight"')
        ),
    ),
    "header with NaN": ("NaN is no number", in_header(lambda h: h.update(x=float("nan")))),
    "no metadata": ("no metadata", in_header(lambda h: h.pop("__metadata__") and None)),
    "metadata of numbers": ("no metadata", in_header(lambda h: h["__metadata__"].update(pieces=1))),
    "overlapping tensors": ("does not begin where the tensor before it ends", in_header(overlap)),
    "hole between tensors": ("does not begin where the tensor before it ends", in_header(gap)),
    "offsets beyond the end": (
        "'master.weight' is not float32, or its shape and offsets differ",
        in_header(lambda h: h[KEY].update(data_offsets=[0, 1 << 50])),
    ),
    "negative offsets": (
        "shape or offsets of 'master.weight' are no whole numbers",
        in_header(lambda h: h[KEY].update(data_offsets=[-768, 0])),
    ),
    "offsets that are no numbers": (
        "shape or offsets of 'master.weight' are no whole numbers",
        in_header(lambda h: h[KEY].update(data_offsets=["0", "768"])),
    ),
    "shape beyond all numbers": (
        "'master.weight' is not float32, or its shape and offsets differ",
        in_header(lambda h: h[KEY].update(shape=[1 << 62] * 2)),
    ),
    "shape of fractions": (
        "shape or offsets of 'master.weight' are no whole numbers",
        in_header(lambda h: h[KEY].update(shape=[3.0, 64])),
    ),
    "another dtype": (
        "'master.weight' is not float32, or its shape and offsets differ",
        in_header(lambda h: h[KEY].update(dtype="F64")),
    ),
    "a dtype of objects": (
        "'master.weight' is not float32, or its shape and offsets differ",
        in_header(lambda h: h[KEY].update(dtype="object")),
    ),
    "a tensor too many": (
        "does not begin where the tensor before it ends",
        in_header(lambda h: h.update({"evil.weight": h[KEY]})),
    ),
    "a kind that is missing": (
        "its tensors take",
        in_header(lambda h: h.pop("exp_avg_sq.weight") and None),
    ),
    "piece of another tensor": (
        "no piece of a parameter: 'other'",
        in_pieces(lambda p: p.update(other=p["weight"])),
    ),
    "piece beyond its tensor": (
        "is no part of a tensor",
        in_pieces(lambda p: p.update(weight=[192, 0, 192, 192, 0, 193])),
    ),
    "piece of a trillion rows": (
        "is no part of a tensor",
        in_pieces(lambda p: p.update(weight=[1, 0, 1, 1, 0, 10**12])),
    ),
    "piece of no width": (
        "is no part of a tensor",
        in_pieces(lambda p: p.update(weight=[192, 0, 192, 0, 0, 192])),
    ),
    "piece that leaves a gap": (
        "its files do not hold each number of weight once",
        in_pieces(lambda p: p.update(weight=[192, 0, 191, 192, 0, 192])),
    ),
    "piece of text": (
        "no piece of a parameter: 'weight'",
        in_pieces(lambda p: p.update(weight="all")),
    ),
    "numbers twice": ("its files do not hold each number of weight once", a_second_file),
    "one file as that of 400 ranks": (
        "the files up to it hold more than all of 0000",
        one_file_as_many,
    ),
    "pickle in disguise": ("a header of ", content(pickle.dumps(Command()))),
    "pickle in a header": ("can't decode byte 0x80", in_header(lambda h: pickle.dumps(Command()))),
    "manifest of a gigabyte's brackets": ("more than 1048576 bytes", a_manifest(b"[" * (1 << 21))),
    "manifest of many lists": ("no JSON object", a_manifest(BIG)),
    "manifest that is a pickle": ("can't decode byte 0x80", a_manifest(pickle.dumps(Command()))),
    "manifest with more keys": (
        "'hook': Extra inputs are not permitted",
        in_manifest(lambda m: m.update(hook="os:system")),
    ),
    "manifest of the past": (
        "format 1, this Picotron reads 2",
        in_manifest(lambda m: m.update(format=1)),
    ),
    "step that is text": (
        "'step': Input should be a valid integer",
        in_manifest(lambda m: m.update(step="1")),
    ),
    "negative step": (
        "'step': Input should be greater than or equal to 0",
        in_manifest(lambda m: m.update(step=-1)),
    ),
    "parameters of no size": (
        "'parameters.weight.0': Input should be greater",
        in_manifest(lambda m: m.update(parameters={"weight": [0, 64]})),
    ),
    "parameters of nine dimensions": (
        "'parameters.weight': List should have at most 8",
        in_manifest(lambda m: m.update(parameters={"weight": [1] * 9})),
    ),
    "parameters that no file has": (
        "bytes for tensors of 13194139535616",
        in_manifest(lambda m: m["parameters"].update(b=[1 << 40])),
    ),
    "a parameter that no file has": (
        "its files do not hold each number of b once",
        in_manifest(lambda m: m["parameters"].update(b=[1])),
    ),
    "backend as a module": (
        "'facts.backends.0.backend': String should match",
        a_backend("os:system"),
    ),
    "backend as a path": (
        "'facts.backends.0.backend': String should match",
        a_backend("../../evil"),
    ),
    "backend as an expression": (
        "'facts.backends.0.backend': String should match",
        a_backend("__import__('os').system('true')"),
    ),
    "loss scale of NaN": (
        "NaN is no number",
        in_manifest(lambda m: m.update(loss_scale={"value": float("nan"), "steps": 0, "skips": 0})),
    ),
    "loss scale of zero": (
        "'loss_scale.value': Input should be greater than 0",
        in_manifest(lambda m: m.update(loss_scale={"value": 0.0, "steps": 0, "skips": 0})),
    ),
    "loss scale in part": (
        "'loss_scale.steps': Field required",
        in_manifest(lambda m: m.update(loss_scale={"value": 1.0})),
    ),
    "fewer kinds than the model has": ("no tensors of the kinds", only_masters),
    "random state of nonsense": (
        "no state of a random generator",
        in_header(lambda h: h["__metadata__"].update({"rng.cpu": "AAAA"})),
    ),
}
LOADS = {
    "random state of nonsense",
    "fewer kinds than the model has",
}  # refused when it is put to use


@pytest.mark.parametrize("kind", EVIL)
def test_it_is_refused_by_name(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_at(1, tmp_path)
    open_checkpoint(folder)
    wanted, make = EVIL[kind]
    make(folder)
    with pytest.raises(DamagedFileError, match=re.escape(wanted)) as refused:
        open_checkpoint(folder) if kind not in LOADS else load_it(folder)
    assert str(folder) in str(refused.value)
    assert not (tmp_path / "pwned").exists()


def load_it(folder: Path) -> None:
    from small_state import state_at

    from picotron_core.checkpoint.load import load

    load(state_at(0), open_checkpoint(folder))


IN_LITTLE_MEMORY = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {support!r})
from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.engine.peak import peak, reset_peak
from picotron_core.errors import DamagedFileError
CPU, opened = torch.device("cpu"), []
sys.addaudithook(lambda event, args: opened.append(event) if event in (
    "exec", "import", "os.system", "subprocess.Popen", "pickle.find_class") else None)

def measured(name, work):
    opened.clear()
    before = reset_peak(CPU)
    work()
    print(name, peak(CPU) - before, opened, flush=True)

def refused(folder):
    try:
        open_checkpoint(folder)
    except DamagedFileError:
        return
    print("ACCEPTED", folder)

measured("control", lambda: b"x" * 60_000_000)
for folder in sorted(Path({evil!r}).glob("*/checkpoints/step-*")):
    measured(folder.parent.parent.name, lambda: refused(folder))
"""


@pytest.mark.skipif(
    reset_peak(torch.device("cpu")) is None, reason="this system keeps no peak to reset"
)
def test_none_takes_memory_or_runs_anything(tmp_path):
    """In one child, whose peak is ours to read; what it imports and runs is told by Python."""
    kinds = [kind for kind in EVIL if kind not in LOADS]
    good = tmp_path / "good"
    save_at(1, good)
    for number, kind in enumerate(kinds):
        run = tmp_path / "evil" / str(number)
        shutil.copytree(good, run)
        EVIL[kind][1](run / "checkpoints" / "step-00000001")
    script = IN_LITTLE_MEMORY.format(
        support=str(Path(forge.__file__).parent), evil=str(tmp_path / "evil")
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    control, *lines = result.stdout.splitlines()
    assert int(control.split()[1]) > 50e6, "what is measured is not what is taken"
    assert len(lines) == len(kinds) >= 30, result.stdout
    for line in lines:
        number, grown, events = line.split(" ", 2)
        assert int(grown) < 50e6, kinds[int(number)]
        assert events == "[]", (kinds[int(number)], events)
    assert not (tmp_path / "pwned").exists()
