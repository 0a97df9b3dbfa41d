"""`picotron train` and its checkpoints: stopped, refused by the disk, gone back, gone on."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
from pathlib import Path

import forge
import pytest

from picotron_core.checkpoint import commit as commits
from picotron_core.checkpoint import save as saves
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.interval import Interval
from picotron_core.cli import train as commands

EVERY = ("--train.steps", "8", "--checkpoint.every", "2", "--checkpoint.keep", "9")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def numbers(run: Path, step: int) -> dict[str, bytes]:
    """All that was saved of a step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def whole(every_save, picotron, tiny, tmp_path):
    """A run that nobody stopped."""
    assert picotron("train", *tiny, *EVERY, "--name", "whole")[0] == 0
    return tmp_path / "runs" / "whole"


def at_each_step(monkeypatch, what):
    """Do what[step]() as that step ends, before its save and its line of the metrics."""
    due = Interval.due

    def then_due(self, step, step_s):
        what.get(step, lambda: None)()
        return due(self, step, step_s)

    monkeypatch.setattr(Interval, "due", then_due)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_saves_and_asks_to_be_started_again(
    whole, picotron, tiny, tmp_path, monkeypatch, number
):
    """Sent to this very process, from within its third step."""
    at_each_step(monkeypatch, {3: lambda: os.kill(os.getpid(), number)})
    code, out, _ = picotron("train", *tiny, *EVERY, "--name", "cut")
    monkeypatch.undo()
    assert code == 75
    assert f"Stopping for {number.name} after this step" in out
    assert "picotron train --resume runs/cut" in out
    run = tmp_path / "runs" / "cut"
    assert len(losses(run)) == 3
    assert (run / "checkpoints" / "step-00000003").is_dir()
    assert picotron("train", "--resume", "runs/cut")[0] == 0
    assert losses(run) == losses(whole)
    assert numbers(run, 8) == numbers(whole, 8)


def test_a_signal_while_a_run_is_prepared_ends_it_there(
    whole, picotron, tiny, tmp_path, monkeypatch
):
    """Before the first step there is nothing to save, and nothing to go on from."""
    prepare = commands.prepare_job

    def asked(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*given)

    monkeypatch.setattr(commands, "prepare_job", asked)
    code, out, _ = picotron("train", *tiny, "--name", "early")
    assert code == 75
    assert "Stopped by SIGTERM before the first step, nothing to save yet" in out
    assert "--resume" not in out
    assert not (tmp_path / "runs" / "early").exists()
    code, out, _ = picotron("train", "--resume", "runs/whole", "--train.steps", "9")
    assert code == 75
    assert "Stopped by SIGTERM before the first step" in out
    assert len(losses(whole)) == 8


def test_ctrl_c_while_a_run_is_prepared_quits_at_once(picotron, tiny, monkeypatch):
    monkeypatch.setattr(commands, "prepare_job", lambda *given: os.kill(os.getpid(), signal.SIGINT))
    code, out, _ = picotron("train", *tiny, "--name", "early")
    assert code == 130
    assert "Stopping" not in out


def test_the_clock_saves_and_asks_to_be_started_again(picotron, tiny, tmp_path):
    code, out, _ = picotron(
        "train", *tiny, "--name", "late", "--run.time_limit", "0:1", "--train.steps", "100000"
    )
    assert code == 75
    assert "picotron train --resume runs/late" in out
    (folder,) = (tmp_path / "runs" / "late" / "checkpoints").iterdir()
    assert folder.name == f"step-{len(losses(tmp_path / 'runs' / 'late')):08d}"
    code, _, err = picotron("train", *tiny, "--run.time_limit", "soon")
    assert code == 2
    assert "run.time_limit = 'soon' is no time" in err


def test_a_disk_that_refuses_now_and_then_does_not_stop_training(
    whole, picotron, tiny, tmp_path, monkeypatch
):
    class Moody(Disk):
        """Full while steps 2, 4 and 6 are written."""

        def write(self, descriptor, data):
            if moods and moods.pop():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(descriptor, data)

    moods = [False, True, True, True]
    monkeypatch.setattr(saves, "Disk", Moody)
    code, out, _ = picotron(
        "train", *tiny, *EVERY, "--name", "full", "--checkpoint.max_misses", "4"
    )
    assert code == 0
    assert out.count("No space left on device") == 3
    run = tmp_path / "runs" / "full"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000008"]
    assert losses(run) == losses(whole)
    assert numbers(run, 8) == numbers(whole, 8)
    moods = [True] * 9
    code, _, err = picotron("train", *tiny, *EVERY, "--checkpoint.max_misses", "2")
    assert code == 1
    assert "No space left on device" in err
    assert "Saves that failed in a row: 2" in err


def test_a_full_disk_takes_neither_saves_nor_metrics_and_does_not_stop_training(
    whole, picotron, tiny, tmp_path, monkeypatch
):
    """The kernel refuses to let any file grow beyond where metrics.jsonl is, in mid line."""
    run = tmp_path / "runs" / "full"
    former = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        room = (run / "metrics.jsonl").stat().st_size + 50
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, former[1]))

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, former)

    at_each_step(monkeypatch, {2: fill, 6: free})
    try:
        code, out, err = picotron("train", *tiny, *EVERY, "--name", "full")
    finally:
        free()
    assert code == 0, err
    assert out.count("metrics.jsonl: File too large") == 1
    assert "not saved: " in out
    assert losses(run) == losses(whole)
    assert numbers(run, 8) == numbers(whole, 8)


def test_stopped_while_the_disk_refuses_it_still_asks_to_be_started_again(
    picotron, tiny, tmp_path, monkeypatch
):
    class Refusing(Disk):
        def create(self, path):
            if "step-00000003" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().create(path)

    monkeypatch.setattr(saves, "Disk", Refusing)
    at_each_step(monkeypatch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    code, out, _ = picotron("train", *tiny, *EVERY, "--checkpoint.max_misses", "1", "--name", "cut")
    assert code == 75
    assert "The steps after 2 are lost" in out
    assert "Stopped at step 3, not saved" in out
    (folder,) = (tmp_path / "runs" / "cut" / "checkpoints").iterdir()
    assert folder.name == "step-00000002"


def test_stopped_in_the_step_that_hears_of_the_last_miss_it_saves_once_more(
    picotron, tiny, tmp_path, monkeypatch
):
    class Refusing(Disk):
        def create(self, path):
            if "step-00000002" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().create(path)

    start = saves.Saver.start

    def written_at_once(saver):
        begun = start(saver)
        saver._flight.task.join(60)
        return begun

    monkeypatch.setattr(saves, "Disk", Refusing)
    monkeypatch.setattr(saves.Saver, "start", written_at_once)
    at_each_step(monkeypatch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    code, out, _ = picotron("train", *tiny, *EVERY, "--checkpoint.max_misses", "1", "--name", "cut")
    assert "step-00000002: [Errno 28] No space left on device" in out
    assert (code, "Stopped at step 3, saved" in out) == (75, True)
    (folder,) = (tmp_path / "runs" / "cut" / "checkpoints").iterdir()
    assert folder.name == "step-00000003"


def test_what_was_verified_to_resume_is_not_read_again(whole, picotron, monkeypatch):
    read = []
    verify = commits.verify

    def noted(folder, manifest):
        read.append(folder.name)
        verify(folder, manifest)

    monkeypatch.setattr(commits, "verify", noted)
    resumed = ("--resume", "runs/whole", "--train.steps", "9", "--checkpoint.every", "0")
    assert picotron("train", *resumed)[0] == 0
    assert "step-00000008" not in read


def poison(folder: Path) -> None:
    """Finite numbers, whole files, and no finite loss."""
    content = bytearray((folder / forge.FILE).read_bytes())
    header, _ = forge.header_of(bytes(content))
    begin, end = header["master.model.norm.weight"]["data_offsets"]
    first = 8 + int.from_bytes(content[:8], "little")
    content[first + begin : first + end] = struct.pack("<f", 3e38) * ((end - begin) // 4)
    forge.write_file(folder, bytes(content))


def test_a_loss_that_is_not_finite_after_a_load_goes_back_one_further(whole, picotron):
    wanted, last = losses(whole), numbers(whole, 8)
    checkpoints = whole / "checkpoints"
    for step in (4, 6):
        poison(checkpoints / f"step-{step:08d}")
    for file in (checkpoints / "step-00000008").iterdir():
        file.unlink()
    code, out, _ = picotron("train", "--resume", "runs/whole", "--checkpoint.max_fallbacks", "1")
    assert code == 1
    assert out.count("going back to") == 1
    code, out, _ = picotron("train", "--resume", "runs/whole", "--checkpoint.max_fallbacks", "2")
    assert code == 0
    assert "It was loaded at step 6: going back to" in out
    assert "It was loaded at step 4: going back to" in out
    assert losses(whole) == wanted
    assert numbers(whole, 8) == last


def test_what_is_at_risk_is_told(picotron, tiny):
    more = ("--train.steps", "40", "--checkpoint.every", "auto")
    code, out, _ = picotron("train", *tiny, *more)
    assert code == 0
    assert "INFO: saved step 10: 0." in out
    assert "at risk until the next: " in out
