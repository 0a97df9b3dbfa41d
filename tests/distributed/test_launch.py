"""`picotron train --nproc`: ranks that are started, stopped and mourned together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from picotron_core.cli.launch import without_nproc

WAIT_S = 90


def start(tiny, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "picotron_core.cli", "train", *tiny, "--run.dir", str(folder)]
    return subprocess.Popen(
        [*command, "--nproc", "2", "--name", "two", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / "two" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The ranks' process ids, in order, once the run is under way."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                variables = (status.parent / "environ").read_bytes().split(b"\0")
                rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), b"")
                found += [(int(rank), int(status.parent.name))] if rank else []
        except OSError:  # it has just ended
            continue
    return [pid for _, pid in sorted(found)]


def wait_for_steps(launcher: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + WAIT_S
    while len(metrics(folder)) < 3:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + WAIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_ranks_of_one_command_train_the_run_of_one(picotron, tiny, tmp_path):
    launcher = start(tiny, tmp_path, "--train.steps", "6", "--train.micro_batch", "2")
    out, err = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 0, err
    assert out.count("Next:") == 1
    one = ("--run.dir", str(tmp_path), "--name", "one", "--train.steps", "6")
    assert picotron("train", *tiny, *one)[0] == 0
    wanted = [json.loads(t) for t in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    for found, right in zip(metrics(tmp_path), wanted, strict=True):
        (key,) = {"loss", "val_loss"} & right.keys()
        assert found[key] == pytest.approx(right[key], rel=1e-5)


def test_a_mistake_is_told_once_with_its_exit_code(tiny, tmp_path):
    launcher = start(tiny, tmp_path, "--parallel.tp", "3")
    _, err = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 2
    assert err.count("parallel.tp = 3 does not divide") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    launcher = start(tiny, tmp_path, "--parallel.schedule", "interleavd")
    _, err = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 2
    assert err.count("must be '1f1b'") == 1


def test_torchruns_rank_starts_no_ranks_of_its_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher = start(tiny, tmp_path)
    _, err = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 2
    assert "leave out --nproc under torchrun" in err


def test_torchrun_starts_the_ranks_as_well(tiny, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "picotron_core.cli", "train", *tiny, "--run.dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, *train, "--train.steps", "2", "--name", "two"],
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_others_and_is_named(tiny, tmp_path):
    launcher = start(tiny, tmp_path, "--train.steps", "100000")
    wait_for_steps(launcher, tmp_path)
    pids = ranks_of(launcher)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    _, err = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == 1
    assert "Rank 1 died of SIGKILL" in err
    assert gone(pids)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("number", "wanted", "to_all"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 75, False)],
    ids=["SIGINT to all, as by a scheduler", "SIGTERM"],
)
def test_a_signal_to_the_launcher_saves_once_and_leaves_nobody(
    tiny, tmp_path, number, wanted, to_all
):
    launcher = start(tiny, tmp_path, "--train.steps", "100000", "--checkpoint.every", "0")
    wait_for_steps(launcher, tmp_path)
    pids = ranks_of(launcher)
    launcher.send_signal(number)
    for pid in pids if to_all else ():
        os.kill(pid, number)
    out, _ = launcher.communicate(timeout=WAIT_S)
    assert launcher.returncode == wanted
    assert out.count("saved. Go on with:") == 1
    assert len(list((tmp_path / "two" / "checkpoints").glob("step-*"))) == 1
    assert gone(pids)


def test_a_scheduler_is_not_asked_to_start_again_what_could_not_be_saved(tiny, tmp_path):
    """It would, for ever."""
    more = ["--checkpoint.every", "0", "--checkpoint.max_misses", "1"]
    launcher = start(tiny, tmp_path, "--train.steps", "100000", *more)
    wait_for_steps(launcher, tmp_path)
    (tmp_path / "two" / "checkpoints").rmdir()
    (tmp_path / "two" / "checkpoints").touch()  # no folder can be made there
    launcher.send_signal(signal.SIGUSR1)
    out, err = launcher.communicate(timeout=WAIT_S)
    assert f"error: {tmp_path}/two/checkpoints is gone" in err
    assert "Go on with" not in out
    assert launcher.returncode == 1


def test_what_the_ranks_are_told():
    line = ["train", "a.toml", "--nproc", "4", "--name", "x", "--nproc=2"]
    assert without_nproc(line) == ["train", "a.toml", "--name", "x"]
