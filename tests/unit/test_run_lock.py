"""Nobody trains in a run's folder in which another process trains."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import pytest

from picotron_core.engine import run_lock
from picotron_core.engine.run_directory import RunDirectory, create
from picotron_core.errors import ConfigError, RunError

WAIT_S = 120  # a busy machine is no failure
LONG = ("--train.steps", "100000", "--checkpoint.every", "2")
COMMAND = [sys.executable, "-m", "picotron_core.cli", "train"]


@pytest.fixture
def training(tiny, tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A real process that trains in runs/demo, and has saved there."""
    process = subprocess.Popen(
        [*COMMAND, *tiny, *LONG, "--name", "demo"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + WAIT_S
    try:
        while not list(tmp_path.glob("runs/demo/checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def metrics_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def stop(process: subprocess.Popen[str]) -> None:
    """Have it stand still, so that what is there stays as it is."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_run_that_another_process_trains_is_left_alone_until_that_is_killed(
    picotron, tiny, tmp_path, training
):
    run = tmp_path / "runs" / "demo"
    stop(training)
    before = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "config.toml")}
    for command in (
        ("--resume", "runs/demo"),
        ("--resume", "auto"),
        (*tiny, *LONG, "--name", "demo", "--run.resume", "true"),
    ):
        limits = ("--run.time_limit", "0:1", "--run.timeout_s", "1")
        code, _, err = picotron("train", *command, *limits)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("error: Another process trains in ")
        assert f"runs/demo: pid {training.pid} on {socket.gethostname()}, since 20" in err
        assert {name: (run / name).read_bytes() for name in before} == before
    write = ("generate", "runs/demo", "--prompt", "a", "--max-new-tokens", "1")
    assert picotron(*write)[0] == 0  # it only reads
    training.kill()
    training.wait()
    newest = max((run / "checkpoints").glob("step-*"))
    steps = str(int(newest.name.removeprefix("step-")) + 1)
    code, out, _ = picotron("train", "--resume", "runs/demo", "--train.steps", steps)
    assert code == 0
    assert "resumed from" in out


def test_every_rank_is_told_and_ends_with_the_same_exit_code(tiny, tmp_path):
    run = create(tmp_path / "runs", "demo")
    command = [*COMMAND, *tiny, "--name", "demo", "--nproc", "2"]
    command += ["--run.resume", "true", "--run.timeout_s", "20"]
    with run_lock.alone_in(run):
        ended = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
    assert ended.returncode == 2
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 2, ended.stderr
    for rank, line in enumerate(sorted(told, key=lambda line: line.rpartition("That was")[2])):
        assert f"pid {os.getpid()} on" in line
        assert f"That was rank {rank}" in line
    assert {path.name for path in run.path.iterdir()} == {"lock"}


def test_the_lock_goes_with_the_run_whether_it_ends_well_or_not(picotron, tiny, tmp_path):
    steps = ("--train.steps", "2", "--checkpoint.every", "2")
    assert picotron("train", *tiny, *steps, "--name", "demo")[0] == 0
    for steps, wanted in (("2", 2), ("3", 0)):  # it is done: refused when the run is locked already
        resumed = ("--resume", "runs/demo", "--train.steps", steps)
        code, _, err = picotron("train", *resumed)
        assert code == wanted
        assert "Another process" not in err
    with run_lock.alone_in(RunDirectory(tmp_path / "runs" / "demo")):
        code, _, err = picotron("train", "--resume", "runs/demo", "--train.steps", "4")
    assert code == 2
    assert f"pid {os.getpid()} on" in err


def test_what_was_saved_until_the_lock_was_free_is_gone_on_from(
    picotron, tiny, tmp_path, monkeypatch
):
    """A job is requeued while the one before still saves: it must not begin anew."""
    command = ("train", *tiny, "--name", "demo", "--run.resume", "true", "--train.steps")
    assert picotron(*command, "2")[0] == 0
    checkpoints, aside = tmp_path / "runs" / "demo" / "checkpoints", tmp_path / "aside"
    checkpoints.rename(aside)
    locked = run_lock._locked

    def saved_before(*given):
        aside.rename(checkpoints)
        return locked(*given)

    monkeypatch.setattr(run_lock, "_locked", saved_before)
    code, out, _ = picotron(*command, "3")
    assert code == 0
    assert "resumed from" in out


def test_who_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    run, waits = create(tmp_path, "demo"), []
    with ExitStack() as other:
        other.enter_context(run_lock.alone_in(run))
        mine = run_lock._held.pop(run.lock)

        def goes_in_the_third(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                mine.close()

        monkeypatch.setattr(run_lock.time, "sleep", goes_in_the_third)
        with run_lock.alone_in(run, patience_s=60):
            assert len(waits) == 3


def test_the_last_word_of_a_lock_is_its_holders(tmp_path):
    run = create(tmp_path, "demo")
    run.lock.write_text("pid 1 on a machine of a very long name, since the beginning of time\n" * 9)
    with run_lock.alone_in(run):
        (line,) = run.lock.read_text().splitlines()
    assert line.startswith(f"pid {os.getpid()} on")


def test_a_start_that_fails_leaves_no_folder_for_its_lock(picotron, tiny, tmp_path):
    code, _, err = picotron("train", *tiny, "--data.paths", "nowhere", "--name", "demo")
    assert code == 2
    assert "Another process" not in err
    assert list((tmp_path / "runs").iterdir()) == []
    assert not run_lock._held


def test_a_folder_that_another_took_meanwhile_is_not_removed(tmp_path):
    run = create(tmp_path, "demo")
    with run_lock.alone_in(run):
        taken = run_lock._held.pop(run.lock)  # as if by another process
        with pytest.raises(ConfigError, match="Another process"), run_lock.alone_in(run):
            pass
        run_lock.remove_unused(run)
        assert run.lock.exists()
        run_lock._held[run.lock] = taken
        (run.path / "metrics.jsonl").touch()
        run_lock.remove_unused(run)
        assert run.lock.exists()
        (run.path / "metrics.jsonl").unlink()
        run_lock.remove_unused(run)
        assert not run.path.exists()
        assert taken.closed


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """A start that fails removes its lock, which another may have opened just before."""
    run, flock, opened = create(tmp_path, "demo"), fcntl.flock, []

    def removed_first(file, how):
        if not opened:
            run.lock.unlink()
        opened.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with run_lock.alone_in(run):
        assert [file.closed for file in opened] == [True, False]
        with pytest.raises(ConfigError), run_lock.alone_in(run):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_lock_is_told_once_and_trained_on(
    picotron, tiny, monkeypatch, number
):
    flock = fcntl.flock

    def refused(file, how):
        if isinstance(file, FileIO):  # the token cache's is a text file
            raise OSError(number, os.strerror(number))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", refused)
    code, out, _ = picotron("train", *tiny, "--train.steps", "2", "--name", "demo")
    assert code == 0
    assert out.count("runs/demo/lock cannot be locked") == 1
    assert os.strerror(number) in out
    code, out, _ = picotron("train", "--resume", "runs/demo", "--train.steps", "3")
    assert code == 0
    assert out.count("cannot be locked") == 1


def test_what_cannot_be_a_lock_is_an_error_of_one_line(tmp_path, monkeypatch):
    run = create(tmp_path, "demo")
    precious = tmp_path / "precious"
    precious.write_text("all that I have")
    run.lock.symlink_to(precious)  # a folder from elsewhere
    with pytest.raises(RunError, match="Cannot lock"), run_lock.alone_in(run):
        pass
    assert precious.read_text() == "all that I have"
    run.lock.unlink()
    run.lock.mkdir()
    with pytest.raises(RunError, match="Is a directory"), run_lock.alone_in(run):
        pass
    run.lock.rmdir()

    def broken(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(RunError, match="Input/output error"), run_lock.alone_in(run):
        pass


@pytest.mark.parametrize("told", [b"", b"\x1b[2Jgone", b"\xff" * 300, b"two\nlines"])
def test_what_a_lock_says_is_shown_only_where_it_is_a_line_of_text(tmp_path, told):
    run = create(tmp_path, "demo")
    with run_lock.alone_in(run):
        run.lock.write_bytes(told)
        with pytest.raises(ConfigError) as refused, run_lock.alone_in(run):
            pass
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


FORKS = """
import os, sys, time
from pathlib import Path
from picotron_core.engine import run_lock
from picotron_core.engine.run_directory import RunDirectory
with run_lock.alone_in(RunDirectory(Path(sys.argv[1]))):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_fork_does_not_outlast_the_rank_with_its_lock(tmp_path):
    """A plugin's child, say, that lives on when the rank is killed."""
    run = create(tmp_path, "demo")
    command = [sys.executable, "-c", FORKS, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        child = int(rank.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=f"pid {rank.pid} on"), run_lock.alone_in(run):
                pass
            rank.kill()
            rank.wait()
            with run_lock.alone_in(run):
                os.kill(child, 0)  # it lives
        finally:
            rank.kill()
            os.kill(child, signal.SIGKILL)
