"""files.py follows no link, and nothing else in the code opens a file for writing."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import picotron_backends
import picotron_conformance
import pytest

import picotron_core
from picotron_core import files

# --- what a call may not do outside files.py

WRITES = {
    *("os.rename", "os.replace", "os.remove", "os.unlink", "os.mkdir", "os.makedirs", "os.rmdir"),
    *("os.removedirs", "os.renames", "os.symlink", "os.link", "os.mkfifo", "os.mknod"),
    *("os.truncate", "numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.savetxt"),
    *("torch.save", "safetensors.torch.save_file", "safetensors.numpy.save_file", "pickle.dump"),
    *("json.dump", "numpy.memmap"),
}
METHODS = {
    *("write_text", "write_bytes", "unlink", "rename", "rmdir", "mkdir", "touch", "symlink_to"),
    *("hardlink_to", "link_to", "savefig", "save", "tofile", "save_file", "imsave", "extractall"),
}
READING = {"shutil.which", "shutil.disk_usage", "shutil.get_terminal_size", "tempfile.gettempdir"}
WRITING_FLAGS = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)")


def names_of(tree: ast.AST) -> dict[str, str]:
    """What a module's imports call things: local name -> whole name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                found[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def whole_name(function: ast.expr, names: dict[str, str]) -> str:
    text = ast.unparse(function)
    first, dot, rest = text.partition(".")
    return names.get(first, first) + dot + rest


def opens_for_writing(call: ast.Call, name: str) -> bool:
    if name == "os.open":
        return WRITING_FLAGS.search(ast.unparse(call)) is not None or not _is_reading(call)
    if name.rpartition(".")[2] not in ("open", "fdopen", "FileIO"):
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    modes = [text for text in texts if re.fullmatch(r"[rwaxbtU+]{1,4}", text)]
    unknown = [
        k for k in call.keywords if k.arg == "mode" and not isinstance(k.value, ast.Constant)
    ]
    return bool(unknown) or any(set(mode) & set("wax+") for mode in modes)


def _is_reading(call: ast.Call) -> bool:
    return len(call.args) > 1 and "O_RDONLY" in ast.unparse(call.args[1])


def writes(call: ast.Call, names: dict[str, str]) -> bool:
    name = whole_name(call.func, names)
    if name in READING or name.startswith("picotron_core.files."):
        return False
    if name in WRITES or name.startswith(("shutil.", "tempfile.")):
        # numpy.memmap maps for reading where it says so.
        return name != "numpy.memmap" or "mode='r'" not in ast.unparse(call)
    if opens_for_writing(call, name):
        return True
    if not isinstance(call.func, ast.Attribute) or names.get(name.partition(".")[0], "") == "files":
        return False
    if call.func.attr == "replace":  # of a path, not of a text or a record
        return len(call.args) == 1 and not call.keywords
    if call.func.attr == "save":  # into something: without an argument it is a method of our own
        return bool(call.args)
    return call.func.attr in METHODS


def writers(text: str) -> Iterator[str]:
    """The calls in a program that write, as they are written."""
    tree = ast.parse(text)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and writes(node, names):
            yield ast.unparse(node.func)


# (file, call) -> why it is harmless there
OWN_TEMPORARY = "in a folder that the system made for this process, or without a name"
IN_MEMORY = "into a BytesIO"
OWN_METHOD = "a method of our own, which uses files.py"
ALLOWED = {
    ("picotron_core/config.py", "os.open"): "the opener of an open() for reading",
    ("picotron_core/engine/peak.py", "(PROCESS / 'clear_refs').write_text"): "a switch of Linux",
    ("picotron_core/data/token_cache.py", "tokenizer.save"): OWN_METHOD,
    ("picotron_core/checkpoint/commit.py", "disk.rename"): OWN_METHOD,
    ("picotron_core/data/pipes.py", "tempfile.mkdtemp"): OWN_TEMPORARY,
    ("picotron_core/data/pipes.py", "shutil.rmtree"): OWN_TEMPORARY,
    ("picotron_core/engine/plot.py", "figure.savefig"): IN_MEMORY,
    ("picotron_core/cli/trace/drawing.py", "self.figure.savefig"): IN_MEMORY,
    ("picotron_core/parallel/folder_store.py", "os.link"): OWN_TEMPORARY,
    ("picotron_core/parallel/private_folder.py", "tempfile.mkdtemp"): OWN_TEMPORARY,
    ("picotron_core/parallel/private_folder.py", "shutil.rmtree"): OWN_TEMPORARY,
    ("picotron_core/data/tokenizer_files.py", "TemporaryDirectory"): OWN_TEMPORARY,
    ("picotron_core/data/tokenizer_files.py", "tokenizer.save"): OWN_METHOD,
    ("picotron_core/cli/trace/schedule.py", "picture.save"): OWN_METHOD,
    ("picotron_core/cli/trace/ring.py", "picture.save"): OWN_METHOD,
    ("picotron_core/cli/export.py", "save_file"): "into a folder that export has just made: the "
    "weights of a shard, which as bytes would take its memory twice",
    ("picotron_core/registry/trial_child.py", "os.fdopen"): "the standard output it was given",
    ("picotron_core/registry/trial.py", "TemporaryFile"): OWN_TEMPORARY,
    ("picotron_core/cli/doctor/machine.py", "tempfile.TemporaryFile"): OWN_TEMPORARY,
    ("picotron_core/cli/doctor/child.py", "tempfile.TemporaryFile"): OWN_TEMPORARY,
    ("picotron_core/cli/doctor/disk.py", "tempfile.TemporaryFile"): OWN_TEMPORARY,
    ("picotron_core/cli/verify_resume.py", "shutil.copytree"): OWN_TEMPORARY,
    ("picotron_core/cli/verify_resume.py", "shutil.rmtree"): OWN_TEMPORARY,
}


def test_nothing_but_files_py_opens_a_file_for_writing():
    found = set()
    for package in (picotron_core, picotron_backends, picotron_conformance):
        folder = Path(package.__file__).parent
        prefix = {"picotron_backends": "backends/", "picotron_conformance": "conformance/"}
        for path in sorted(folder.rglob("*.py")):
            name = prefix.get(folder.name, "") + str(path.relative_to(folder.parent))
            if name != "picotron_core/files.py":
                text = path.read_text(encoding="utf-8")
                found |= {(name, call) for call in writers(text)}
    assert sorted(found - ALLOWED.keys()) == [], "use a function of picotron_core/files.py"
    assert sorted(ALLOWED.keys() - found) == [], "these are no exceptions any more"


@pytest.mark.parametrize(
    "text",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, mode=mode)",
        "path.open('r+b')",
        "(folder / 'name').open(mode='x')",
        "import io; io.open(path, 'w')",
        "import io; io.FileIO(path, 'wb')",
        "from io import FileIO; FileIO(3, 'r+')",
        "import gzip; gzip.open(path, 'wt')",
        "import os; os.open(path, os.O_RDWR | os.O_CREAT)",
        "import os; os.open(path, flags)",
        "import os as system; system.replace(a, b)",
        "from os import unlink; unlink(path)",
        "import shutil; shutil.copy(a, b)",
        "from shutil import rmtree as gone; gone(path)",
        "import tempfile; tempfile.mkdtemp()",
        "from tempfile import NamedTemporaryFile; NamedTemporaryFile()",
        "path.write_text('x', encoding='utf-8')",
        "path.replace(other)",
        "path.rename(other)",
        "path.mkdir(parents=True)",
        "path.unlink(missing_ok=True)",
        "import numpy as np; np.save(path, x)",
        "import numpy as np; np.memmap(path, mode='r+')",
        "x.tofile(path)",
        "import torch; torch.save(x, path)",
        "from safetensors.torch import save_file; save_file(x, path)",
        "import safetensors.torch; safetensors.torch.save_file(x, path)",
        "figure.savefig(path)",
        "image.save(path)",
        "import json; json.dump(x, file)",
    ],
)
def test_every_way_of_writing_is_seen(text):
    assert list(writers(text)) != []


@pytest.mark.parametrize(
    "text",
    [
        "open(path)",
        "open(path, 'rb')",
        "path.open(encoding='utf-8')",
        "import os; os.open(path, os.O_RDONLY)",
        "text.replace('a', 'b')",
        "from dataclasses import replace; replace(x, a=1)",
        "import shutil; shutil.which('sbatch')",
        "saver.save()",
        "import numpy as np; np.memmap(path, mode='r')",
        "from picotron_core.files import rename; rename(a, b)",
    ],
)
def test_reading_is_allowed(text):
    assert list(writers(text)) == []


# --- files.py itself


@pytest.fixture
def victim(tmp_path):
    """A file of the user's, outside of the folder that is written to."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


WAYS = {
    "create": lambda path: files.create(path).close(),
    "open_append": lambda path: files.open_append(path).close(),
    "open_update": lambda path: files.open_update(path).close(),
    "open_lock": lambda path: files.open_lock(path).close(),
    "open_regular": lambda path: files.open_regular(path).close(),
    "new_folder": files.new_folder,
    "make_folder": files.make_folder,
    "make_link": lambda path: files.make_link(path, path.parent),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("target", ["victim", "folder-of-victim", "nowhere"])
def test_a_link_in_the_way_is_an_error_and_stays(victim, way, target):
    path = victim.parent / "folder" / "name"
    (victim.parent / "folder-of-victim").mkdir()
    path.symlink_to(victim.parent / target)
    with pytest.raises(OSError, match=r"link|exists"):
        way(path)
    assert path.is_symlink()
    assert victim.read_text() == "precious"
    assert not (victim.parent / "nowhere").exists()


def writing_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.writing")


REPLACE = {
    "replace_text": lambda path, _: files.replace_text(path, "new"),
    "replace_bytes": lambda path, _: files.replace_bytes(path, b"new"),
    "copy_file": lambda path, source: files.copy_file(source, path),
}


@pytest.mark.parametrize("replace", REPLACE.values(), ids=REPLACE)
@pytest.mark.parametrize("name_of", [lambda path: path, writing_name], ids=["final", "temporary"])
def test_replacing_takes_the_place_of_a_link(victim, replace, name_of):
    source = victim.parent / "source"
    source.write_text("new")
    path = victim.parent / "folder" / "name"
    name_of(path).symlink_to(victim)
    replace(path, source)
    assert not path.is_symlink()
    assert path.read_text() == "new"
    assert victim.read_text() == "precious"
    assert [p.name for p in path.parent.iterdir()] == ["name"]


def test_what_fails_while_it_replaces_leaves_the_old_file(tmp_path):
    path = tmp_path / "name"
    path.write_text("old")

    def fail():
        with files.replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


def test_removing_takes_links_and_not_their_targets(victim):
    folder = victim.parent / "folder"
    (folder / "sub").mkdir()
    (folder / "sub/link").symlink_to(victim)
    (folder / "sub/folder").symlink_to(victim.parent)
    files.remove_tree(folder / "sub")
    for remove in (files.remove_tree, files.remove_file):
        (folder / "link").symlink_to(victim.parent)
        remove(folder / "link")
        remove(folder / "nothing")
    assert list(folder.iterdir()) == []
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["open_append", "open_update", "open_lock", "open_regular"])
def test_a_pipe_is_an_error_and_waits_for_nobody(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"not a plain file|No such device"):
        WAYS[name](tmp_path / "pipe")


def test_links_are_named(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path)
    files.refuse_links(tmp_path, "tokenizer", "nothing")
    with pytest.raises(OSError, match=r"is a link.*checkpoints"):
        files.refuse_links(tmp_path, "tokenizer", "checkpoints")


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.replace_text(tmp_path / "file", "x")
        files.make_folder(tmp_path / "folder")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_owners_are_asked_of_the_open_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with files.open_regular(path, owners=files.trusted_owners(tmp_path)) as file:
        assert file.read() == b"x"
    with pytest.raises(files.ForeignOwnerError, match="belongs to user"):
        files.open_regular(path, owners={files.user_id() + 1})
