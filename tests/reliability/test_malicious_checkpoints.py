"""A checkpoint from anywhere: all but plain numbers in their place is refused, in little memory.

Every one of these is vouched for by its manifest's checksums, as an attacker's would be.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import pytest
from small_state import save_at

from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.errors import DamagedFileError

KEY = "master.weight"


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
    return lambda folder: forge.write_file(folder, text)


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
    forge.write_file(folder, (folder / forge.FILE).read_bytes(), "rank-00001.safetensors")


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


def gap(header: dict[str, Any]) -> None:
    for entry in (header["exp_avg.weight"], header["exp_avg_sq.weight"]):
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


BIG = b"[" + b"[]," * 200_000 + b"[]]"

EVIL: dict[str, Callable[[Path], None]] = {
    "path upwards": named("../escaped.safetensors"),
    "absolute path": named("/tmp/rank-00000.safetensors"),
    "path below": named("sub/rank-00000.safetensors"),
    "drive letter": named("C:rank-00000.safetensors"),
    "backslashes": named("..\\rank-00000.safetensors"),
    "NUL in a name": named("rank-00000.safetensors\0.txt"),
    "newline in a name": named("rank-00000.safetensors\n"),
    "the manifest as a file": named("manifest.json"),
    "endless name": named("rank-" + "0" * 300 + ".safetensors"),
    "link to a file": a_link,
    "link to the manifest": a_linked_manifest,
    "link to the folder": a_linked_folder,
    "link to a device": a_device,
    "pipe": a_pipe,
    "sparse file of gigabytes": a_sparse_file,
    "header longer than the file": content((1 << 40).to_bytes(8, "little") + b"{}"),
    "negative header": content(b"\xff" * 8 + b"{}"),
    "header of a megabyte and more": in_header(lambda h: b" " * (1 << 20) + b"{}"),
    "header cut off": content(b"\x10\0"),
    "empty file": content(b""),
    "header that is no JSON": in_header(lambda h: b"\x80\x04K\x01."),
    "header that is a list": in_header(lambda h: BIG),
    "header of brackets": in_header(lambda h: b"[" * 100_000),
    "header with a key twice": in_header(
        lambda h: json.dumps(h).encode().replace(b'"exp_avg.weight"', b'"master.weight"')
    ),
    "header with NaN": in_header(lambda h: h.update(x=float("nan"))),
    "no metadata": in_header(lambda h: h.pop("__metadata__") and None),
    "metadata of numbers": in_header(lambda h: h["__metadata__"].update(pieces=1)),
    "overlapping tensors": in_header(overlap),
    "hole between tensors": in_header(gap),
    "offsets beyond the end": in_header(lambda h: h[KEY].update(data_offsets=[0, 1 << 50])),
    "negative offsets": in_header(lambda h: h[KEY].update(data_offsets=[-768, 0])),
    "offsets that are no numbers": in_header(lambda h: h[KEY].update(data_offsets=["0", "768"])),
    "shape beyond all numbers": in_header(lambda h: h[KEY].update(shape=[1 << 62] * 2)),
    "shape of fractions": in_header(lambda h: h[KEY].update(shape=[3.0, 64])),
    "another dtype": in_header(lambda h: h[KEY].update(dtype="F64")),
    "a dtype of objects": in_header(lambda h: h[KEY].update(dtype="object")),
    "a tensor too many": in_header(lambda h: h.update({"evil.weight": h[KEY]})),
    "a kind that is missing": in_header(lambda h: h.pop("exp_avg_sq.weight") and None),
    "piece of another tensor": in_pieces(lambda p: p.update(other=p["weight"])),
    "piece beyond its tensor": in_pieces(lambda p: p.update(weight=[192, 0, 192, 192, 0, 193])),
    "piece of a trillion rows": in_pieces(lambda p: p.update(weight=[1, 0, 1, 1, 0, 10**12])),
    "piece of no width": in_pieces(lambda p: p.update(weight=[192, 0, 192, 0, 0, 192])),
    "piece that leaves a gap": in_pieces(lambda p: p.update(weight=[192, 0, 191, 192, 0, 192])),
    "piece of text": in_pieces(lambda p: p.update(weight="all")),
    "numbers twice": a_second_file,
    "pickle in disguise": content(pickle.dumps(Command())),
    "pickle in a header": in_header(lambda h: pickle.dumps(Command())),
    "manifest of a gigabyte's brackets": a_manifest(b"[" * (1 << 21)),
    "manifest of many lists": a_manifest(BIG),
    "manifest that is a pickle": a_manifest(pickle.dumps(Command())),
    "manifest with more keys": in_manifest(lambda m: m.update(hook="os:system")),
    "manifest of the past": in_manifest(lambda m: m.update(format=1)),
    "step that is text": in_manifest(lambda m: m.update(step="1")),
    "negative step": in_manifest(lambda m: m.update(step=-1)),
    "parameters of no size": in_manifest(lambda m: m.update(parameters={"weight": [0, 64]})),
    "parameters of nine dimensions": in_manifest(
        lambda m: m.update(parameters={"weight": [1] * 9})
    ),
    "parameters that no file has": in_manifest(lambda m: m["parameters"].update(b=[1 << 40])),
    "backend as a module": a_backend("os:system"),
    "backend as a path": a_backend("../../evil"),
    "backend as an expression": a_backend("__import__('os').system('true')"),
    "loss scale of NaN": in_manifest(lambda m: m.update(loss_scale={"value": "nan"})),
    "random state of nonsense": in_header(lambda h: h["__metadata__"].update({"rng.cpu": "AAAA"})),
}
LOADS = {"random state of nonsense"}  # refused when it is put to use


@pytest.mark.parametrize("kind", EVIL)
def test_it_is_refused_by_name(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_at(1, tmp_path)
    open_checkpoint(folder)
    EVIL[kind](folder)
    with pytest.raises(DamagedFileError, match=r"rank-|manifest|is a link"):
        open_checkpoint(folder) if kind not in LOADS else load_it(folder)
    assert not (tmp_path / "pwned").exists()


def load_it(folder: Path) -> None:
    from small_state import state_at

    from picotron_core.checkpoint.load import load

    load(state_at(0), open_checkpoint(folder))


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {support!r})
from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.errors import DamagedFileError
opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event in (
    "exec", "import", "os.system", "subprocess.Popen", "pickle.find_class") else None)
for folder in sorted(Path({evil!r}).glob("*/checkpoints/step-*")):
    usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, _ = usage(), opened.clear()
    try:
        open_checkpoint(folder)
    except DamagedFileError:
        pass
    else:
        print("ACCEPTED", folder)
    print(folder.parent.parent.name, usage() - before, opened)
"""


def test_none_takes_memory_or_runs_anything(tmp_path):
    """In one child, whose peak is ours to read; what it imports and runs is told by Python."""
    kinds = [kind for kind in EVIL if kind not in LOADS]
    good = tmp_path / "good"
    save_at(1, good)
    for number, kind in enumerate(kinds):
        run = tmp_path / "evil" / str(number)
        shutil.copytree(good, run)
        EVIL[kind](run / "checkpoints" / "step-00000001")
    script = IN_LITTLE_MEMORY.format(
        support=str(Path(forge.__file__).parent), evil=tmp_path / "evil"
    )
    script = script.replace("PosixPath(", "(")
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(kinds) >= 30, result.stdout
    for line in lines:
        number, grown, events = line.split(" ", 2)
        assert float(grown) < 50, kinds[int(number)]
        assert events == "[]", (kinds[int(number)], events)
    assert not (tmp_path / "pwned").exists()
