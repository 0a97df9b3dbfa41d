"""The cache's folder: only what Picotron made is removed, and no other user can slip tokens in."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from users import ALICE, BOB, needs_root, open_folder, run

from picotron_core.data import token_cache
from picotron_core.data.cache_folder import MARK, MARKER, start_entry
from picotron_core.data.corpus import open_corpus
from picotron_core.data.token_cache import prepare
from picotron_core.errors import DamagedFileError, DataError

assert open_folder  # a fixture
KEY, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {n}, of some words and {n * n}\n" for n in range(2000)))
    return path


def build(corpus, cache_dir, **options):
    settings = {"tokenizer": "", "vocab_size": 300, "val_fraction": 0.2, **options}
    return prepare(open_corpus([str(corpus)]), cache_dir=cache_dir, **settings)


def snapshot(folder):
    """Everything below a folder: kinds, permissions, contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        target = os.readlink(path) if path.is_symlink() else ""
        found[path] = (status.st_mode, status.st_mtime_ns, content, target)
    return found


def foreign_folder(folder):
    (folder / ".venv.old/lib").mkdir(parents=True)
    (folder / ".venv.old/lib/code.py").write_text("x = 1")


def foreign_locks(folder):
    for name in (".git.lock", ".config.lock", f".{KEY}.lock", "lock", ".picotron-notes.lock"):
        (folder / name).write_text("keep")


def git_checkout(folder):
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / ".git/index.lock").write_text("keep")
    (folder / f".git.{KEY}").mkdir()
    (folder / f".git.{KEY}/file").write_text("keep")


def links(folder):
    victim = folder / "victim"
    victim.mkdir()
    (victim / MARKER).write_bytes(MARK)  # as if Picotron had made it
    (victim / "precious").write_text("keep")
    (folder / ".a.b").symlink_to(victim)
    (folder / f".picotron-{KEY}-{'0' * 16}").symlink_to(victim)
    (folder / f".picotron-{OTHER}.lock").symlink_to(victim / "precious")
    (folder / ".dangling.link").symlink_to("nowhere")


def marker_is_a_link(folder):
    (folder / "mark").write_bytes(MARK)
    left = folder / f".picotron-{KEY}-{'1' * 16}"
    left.mkdir()
    (left / "precious").write_text("keep")
    (left / MARKER).symlink_to("../mark")


def pipes_and_sockets(folder):
    os.mkfifo(folder / ".pipe.lock")
    os.mkfifo(folder / f".picotron-{KEY}-{'2' * 16}")
    (folder / f".picotron-{KEY}-{'3' * 16}").mkdir()
    os.mkfifo(folder / f".picotron-{KEY}-{'3' * 16}" / MARKER)


def names_that_are_no_text(folder):
    for name in (b".caf\xe9.old", b".\xff.\xfe", b".picotron-\xff"):
        os.mkdir(os.path.join(os.fsencode(folder), name))
    with open(os.path.join(os.fsencode(folder), b".caf\xe9.old", b"\xff.txt"), "w") as file:
        file.write("keep")


def unmarked_folders_of_like_names(folder):
    names = (
        f".picotron-{KEY}-{'4' * 16}",  # our name, but nothing says that we made it
        f".picotron-{KEY.upper()}-{'4' * 16}",
        f".picotron-{KEY[:-1]}-{'4' * 16}",
        f".picotron-{KEY}",
        f".picotron-{KEY}-{'4' * 16}-old",
        f".{KEY}.{'4' * 8}",
    )
    for number, name in enumerate(names):
        (folder / name).mkdir()
        (folder / name / "precious").write_text("keep")
        if number:
            (folder / name / MARKER).write_bytes(MARK)
    (folder / names[0] / MARKER).write_bytes(MARK + b"and mine")


def a_lock_that_is_held(folder):
    """Not touched: a folder whose key's lock cannot be had, here as its name is a folder."""
    (folder / f".picotron-{OTHER}.lock").mkdir()
    start_entry(folder / OTHER)


FOREIGN = [
    foreign_folder,
    foreign_locks,
    git_checkout,
    links,
    marker_is_a_link,
    pipes_and_sockets,
    names_that_are_no_text,
    unmarked_folders_of_like_names,
    a_lock_that_is_held,
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda made: made.__name__)
def test_what_is_not_ours_is_left_alone(corpus, tmp_path, foreign):
    folder = tmp_path / "home"
    folder.mkdir()
    foreign(folder)
    before = snapshot(folder)
    tokens = build(corpus, folder)
    after = {path: found for path, found in snapshot(folder).items() if path in before}
    assert after == before
    assert tokens.folder.parent == folder
    new = {path.name for path in folder.iterdir()} - {path.name for path in before}
    assert new == {tokens.key, f".picotron-{tokens.key}.lock"}


def test_what_killed_builders_left_is_swept(corpus, tmp_path):
    key = build(corpus, tmp_path).key
    shutil.rmtree(tmp_path / key)
    for name in (key, OTHER):
        left = start_entry(tmp_path / name)
        (left / "train.bin").write_bytes(b"half")
        (left / "folder").mkdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("keep")
    (left / "link").symlink_to(victim)
    tokens = build(corpus, tmp_path)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert sorted(folders) == sorted([tokens.folder, victim])
    assert (victim / "precious").read_text() == "keep"


@pytest.mark.parametrize("kind", ["link", "link to a marked folder", "folder"])
def test_what_is_put_in_the_place_of_a_finished_build_is_not_removed(
    corpus, tmp_path, monkeypatch, kind
):
    """The name of the folder that was built is free once it is renamed, and known to others."""
    cache, victim = tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("keep")
    if "marked" in kind:
        (victim / MARKER).write_bytes(MARK)
    rename, made = token_cache.rename, []

    def rename_and_attack(path, new):
        rename(path, new)
        made.append(path)
        if kind == "folder":
            victim.rename(path)
        else:
            path.symlink_to(victim)

    monkeypatch.setattr(token_cache, "rename", rename_and_attack)
    assert build(corpus, cache).folder.is_dir()
    assert (made[0] / "precious").read_text() == "keep"


@pytest.mark.parametrize("cache", [".", "link"])
def test_the_cache_itself_may_lie_behind_a_link(corpus, tmp_path, cache):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    tokens = build(corpus, tmp_path / cache)
    assert tokens.folder == (tmp_path / cache).resolve() / tokens.key


def as_link(path, victim):
    target = victim / path.name
    path.rename(target)
    path.symlink_to(target)


def as_pipe(path, victim):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    os.mkfifo(path)


NAMES = ("", "meta.json", "train.bin", "validation.bin", "tokenizer.json")


@pytest.mark.parametrize("turned", [as_link, as_pipe])
@pytest.mark.parametrize("name", NAMES)
def test_an_entry_that_is_no_plain_one_is_refused(corpus, tmp_path, name, turned):
    tokens = build(corpus, tmp_path / "cache")
    (tmp_path / "victim").mkdir()
    path = tokens.folder / name if name else tokens.folder
    turned(path, tmp_path / "victim")
    with pytest.raises((DamagedFileError, DataError)) as caught:
        build(corpus, tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "Delete " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_entry_under_the_name_of_another_is_refused(corpus, tmp_path):
    """In a folder that others may write to they can rename it, and it is still this user's."""
    wanted, other = build(corpus, tmp_path).folder, build(corpus, tmp_path, seed=1).folder
    shutil.rmtree(wanted)
    other.rename(wanted)
    with pytest.raises(DamagedFileError, match=r"meta\.json is of other tokens"):
        build(corpus, tmp_path)
    with pytest.raises(DamagedFileError, match=r"meta\.json is of other tokens"):
        token_cache.open_cached(tmp_path, wanted.name, "text that is gone")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_plain_file_is_one_line(corpus, tmp_path, kind):
    tokens = build(corpus, tmp_path / "cache")
    shutil.rmtree(tokens.folder)
    lock = tmp_path / "cache" / f".picotron-{tokens.key}.lock"
    lock.unlink()
    (tmp_path / "precious").write_text("keep")
    if kind == "link":
        lock.symlink_to(tmp_path / "precious")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(DataError, match=r"^Cannot write the token cache"):
        build(corpus, tmp_path / "cache")
    assert (tmp_path / "precious").read_text() == "keep"


def test_nobody_else_can_write_what_is_used_whatever_the_umask(corpus, tmp_path):
    before = os.umask(0)
    try:
        folder = build(corpus, tmp_path / "cache").folder
    finally:
        os.umask(before)
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)


SHARED = f"""
import tempfile
from picotron_core.data.corpus import open_corpus
from picotron_core.data.token_cache import prepare

ALICE, BOB = {ALICE}, {BOB}
corpus, shared = Path(sys.argv[1]), Path(sys.argv[2])

def build(cache_dir=None):
    tokens = prepare(open_corpus([str(corpus)]), tokenizer="", vocab_size=300, val_fraction=0.2,
                     cache_dir=cache_dir or shared)
    folder = os.path.relpath(tokens.folder, shared)
    return folder, sum(map(int, tokens.train)), os.stat(tokens.folder).st_uid

with tempfile.TemporaryDirectory() as folder:
    import_what_is_needed_for(lambda: build(Path(folder) / "cache"), Path(folder) / "modules")
print("BEGIN")

def folder_of(owner, mode):
    shared.mkdir()
    os.chown(shared, owner, owner)
    shared.chmod(mode)
"""


def shared_by(code, corpus, folder):
    text = shutil.copy(corpus, folder)
    os.chmod(text, 0o644)
    lines = run(SHARED + code, text, folder / "cache")
    return lines[lines.index("BEGIN") + 1 :]


@needs_root
@pytest.mark.parametrize("mode", ["0o755", "0o1777", "0o777"])
def test_a_second_user_opens_what_the_owner_of_the_cache_built(corpus, open_folder, mode):
    first, second = shared_by(
        f"folder_of(ALICE, {mode}); as_user(ALICE, build); as_user(BOB, build)", corpus, open_folder
    )
    assert first == second
    assert first.startswith("DONE")
    assert first.endswith(f"{ALICE})")


@needs_root
def test_users_of_a_folder_of_root_do_not_trust_each_other(corpus, open_folder):
    first, second, third, root = shared_by(
        "folder_of(0, 0o1777); as_user(ALICE, build); as_user(BOB, build); as_user(BOB, build);"
        "as_user(0, build)",
        corpus,
        open_folder,
    )
    assert first.endswith(f"{ALICE})")
    assert f"user-{BOB}/" in second
    assert second.endswith(f"{BOB})")
    assert third == second
    assert root.endswith(" 0)")


@needs_root
@pytest.mark.parametrize("poison", ["entry", "meta.json", "train.bin", "tokenizer.json"])
def test_tokens_that_another_user_put_there_are_not_used(corpus, open_folder, poison):
    """Bob owns nothing there but the entry, or one file of it."""
    lines = shared_by(
        f"""
folder_of(ALICE, 0o777)
as_user(ALICE, build)
(entry,) = (path for path in shared.iterdir() if path.is_dir())
poisoned = entry if {poison!r} == "entry" else entry / {poison!r}
os.chown(poisoned, BOB, BOB)
as_user(ALICE, build)
""",
        corpus,
        open_folder,
    )
    assert lines[0].startswith("DONE")
    if poison == "entry":
        assert f"user-{ALICE}/" in lines[1]
    else:
        assert f"{poison} belongs to user {BOB}" in lines[1]
        assert "Delete the folder" in lines[1]


@needs_root
def test_a_part_that_another_user_took_is_refused_in_one_line(corpus, open_folder):
    lines = shared_by(
        """
folder_of(0, 0o1777)
as_user(BOB, build)
as_user(BOB, lambda: (shared / f"user-{ALICE}").mkdir())
as_user(ALICE, build)
""",
        corpus,
        open_folder,
    )
    assert lines[-1].startswith("DataError: ")
    assert f"user-{ALICE} belongs to user {BOB}" in lines[-1]
    assert "--data.cache_dir" in lines[-1]


@needs_root
def test_the_umask_of_the_first_user_is_respected_and_told(corpus, open_folder):
    first, second = shared_by(
        "folder_of(ALICE, 0o1777); as_user(ALICE, build, umask=0o077); as_user(BOB, build)",
        corpus,
        open_folder,
    )
    assert first.startswith("DONE")
    assert second.startswith("DataError: ")
    assert "chmod -R a+rX" in second
    assert "--data.cache_dir" in second


@needs_root
def test_a_cache_that_cannot_be_written_is_used_or_refused(corpus, open_folder):
    first, second, third = shared_by(
        """
folder_of(ALICE, 0o755)
as_user(ALICE, build)
as_user(BOB, build)
corpus.write_text(corpus.read_text() + "more")
as_user(BOB, build)
""",
        corpus,
        open_folder,
    )
    assert first == second
    assert third.startswith("DataError: Cannot write the token cache in ")
    assert "Permission denied" in third


@needs_root
def test_a_lock_of_another_user_is_waited_for(corpus, open_folder):
    """Bob can but read the lock's file that Alice made: a lock on it works all the same."""
    lines = shared_by(
        """
folder_of(ALICE, 0o1777)
as_user(ALICE, build)
(entry,) = (path for path in shared.iterdir() if path.is_dir())
import shutil
shutil.rmtree(entry)
as_user(BOB, build)
""",
        corpus,
        open_folder,
    )
    assert lines[0].startswith("DONE")
    assert lines[1].endswith(f"{BOB})")


def test_snapshots_see_a_change(tmp_path):
    foreign_folder(tmp_path)
    before = snapshot(tmp_path)
    Path(tmp_path / ".venv.old/lib/code.py").write_text("y = 1")
    assert snapshot(tmp_path) != before
