"""Temporary folders: who can enter them, where they are made, and that they are removed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from picotron_core.errors import RunError
from picotron_core.parallel import private_folder as module
from picotron_core.parallel.private_folder import MARKER, PREFIX, private_folder

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """TMPDIR. The folders above are as pytest makes them: nobody else can enter."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def as_another_user(work) -> bool:
    """Whether `work` raises PermissionError for another user."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    code = 0
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()
    except PermissionError:
        code = 7
    finally:
        os._exit(code)


def test_it_is_of_its_user_alone_and_gone_at_the_end(place):
    os.umask(0o000)
    try:
        with private_folder() as folder:
            assert folder.path.parent == place
            assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    finally:
        os.umask(0o022)
    assert not list(place.iterdir())


@as_root
@pytest.mark.parametrize(
    "work",
    [
        os.listdir,
        lambda path: (path / "store").read_bytes(),
        lambda path: (path / "store").open("ab"),
        lambda path: (path / "new").touch(),
        lambda path: os.rename(path, f"{path}-mine"),
        lambda path: os.symlink("/etc", path / "link"),
    ],
)
def test_another_user_can_do_nothing_in_it(work):
    with private_folder() as folder:  # in /tmp, which others can enter
        assert folder.path.parent == Path(os.environ.get("TMPDIR", "/tmp")).resolve()
        (folder.path / "store").write_bytes(b"secret")
        assert as_another_user(lambda: work(folder.path))


def open_to_all(place):
    place.chmod(0o777)


def of_another(place):
    os.chown(place, 12345, 12345)


def below_an_open_one(place):
    place.parent.chmod(0o777)


def removed(place):
    place.rmdir()


def a_file(place):
    place.rmdir()
    place.touch()


@pytest.mark.parametrize(
    "make",
    [open_to_all, pytest.param(of_another, marks=as_root), below_an_open_one, removed, a_file],
)
def test_where_others_could_replace_it_another_place_is_taken_and_said(place, caplog, make):
    make(place)
    with caplog.at_level("WARNING"), private_folder() as folder:
        assert folder.path.parent != place
        assert str(place) in caplog.text
    place.parent.chmod(0o700)


def test_with_no_place_at_all_the_error_names_them(place, monkeypatch):
    place.chmod(0o777)
    monkeypatch.setattr(module, "_parents", lambda: iter([place]))
    with pytest.raises(RunError, match=r"can be changed by every user .* Set TMPDIR"):
        private_folder().__enter__()


def test_a_sticky_folder_of_all_is_as_good_as_tmp(place):
    place.chmod(0o1777)
    with private_folder() as folder:
        assert folder.path.parent == place


def test_a_name_that_is_not_utf8_will_do(place, monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    (place / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(place / name))
    with private_folder() as folder:
        assert folder.path.parent.name == name


HOLDER = """
from picotron_core.parallel.private_folder import private_folder
with private_folder() as folder:
    print(folder.path, flush=True)
    input()
"""


def test_what_killed_processes_left_is_removed_by_the_next(place):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    left = Path(process.stdout.readline().strip())
    with private_folder():
        assert left.is_dir()  # it is alive
    process.kill()
    process.communicate()
    assert left.is_dir()
    with private_folder():
        assert not left.exists()


def no_marker(folder):
    (folder / MARKER).unlink()


def a_link_as_marker(folder):
    (folder / MARKER).rename(folder.parent / "marker")
    (folder / MARKER).symlink_to(folder.parent / "marker")


def another_machine(folder):
    (folder / MARKER).write_text("elsewhere")


def readable(folder):
    folder.chmod(0o755)


def another_user(folder):
    os.chown(folder, NOBODY, NOBODY)


def a_pipe_as_marker(folder):
    (folder / MARKER).unlink()
    os.mkfifo(folder / MARKER)


@pytest.mark.parametrize(
    "change",
    [
        no_marker,
        a_link_as_marker,
        another_machine,
        readable,
        a_pipe_as_marker,
        pytest.param(another_user, marks=as_root),
    ],
)
def test_nothing_is_removed_that_is_not_surely_our_own(place, change):
    mine = place / f"{PREFIX}notes"
    mine.mkdir(mode=0o700)
    (mine / MARKER).write_bytes(os.uname().nodename.encode())
    (mine / "thesis.txt").write_text("years of work")
    change(mine)
    with private_folder():
        pass
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_link_with_our_name_is_not_followed(place, tmp_path):
    other = tmp_path / "precious"
    other.mkdir(mode=0o700)
    (other / MARKER).write_bytes(os.uname().nodename.encode())
    (place / f"{PREFIX}link").symlink_to(other)
    with private_folder():
        pass
    assert (other / MARKER).exists()


def test_the_last_of_two_processes_removes_it(place):
    child = """
import time
from picotron_core.parallel import lifeline
lifeline.attach()
print("attached", flush=True)
time.sleep(600)
"""
    starter = f"""
import subprocess, sys, os
from picotron_core.parallel.lifeline import starter
with starter() as start:
    child = subprocess.Popen(
        [sys.executable, "-c", {child!r}], env=os.environ | start.variables,
        pass_fds=start.descriptors)
    child.wait()
"""
    first = subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "attached\n"
    assert len(list(place.iterdir())) == 1
    first.send_signal(signal.SIGKILL)
    _, err = first.communicate()  # until the child has ended, too
    assert "The process that started this one is gone" in err
    assert not list(place.iterdir())
