"""A rank that is killed, stopped or raises: all others leave in time, and say which rank and where.

`make failures` asks every case; CI asks some.
"""

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults")
TIMEOUT_S = 8.0  # longer than anything takes of a run this small, on however busy a machine
BOUND_S = TIMEOUT_S + 10  # the promise itself, from the fault to the end of the last process
START_S = 150  # that the fault may take to come about: no promise

LAYOUTS = {  # on four ranks; on two there are replicas
    "forward": ("--parallel.tp", "2"),
    "backward": ("--parallel.pp", "2", "--train.accumulation", "2"),
    "step": ("--parallel.zero", "1"),
    "save": ("--parallel.pp", "2", "--parallel.zero", "1"),
}
EVERY = [
    (kind, phase, size)
    for size in (2, 4)
    for phase in LAYOUTS
    for kind in ("kill", "stop", "raise")
]
IN_CI = [("stop", "backward", 4), ("raise", "step", 2), ("kill", "save", 2)]


@dataclass(kw_only=True)
class Struck:
    """Processes of a run of which one rank is struck, and their output."""

    fault: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)

    def text(self, number: int) -> str:
        return self.outputs[number].read_text()

    def wait_for_the_fault(self) -> float:
        """Until when the others have to be gone."""
        end = time.monotonic() + START_S
        while not (self.fault.exists() and self.fault.read_text()):
            assert any(p.poll() is None for p in self.processes), [map(self.text, (0, 1))]
            assert time.monotonic() < end, "the fault did not come about"
            time.sleep(0.05)
        return time.monotonic() + BOUND_S - (time.time() - float(self.fault.read_text()))


@pytest.fixture
def struck(tmp_path):
    run = Struck(fault=tmp_path / "fault")
    yield run
    for process in run.processes:
        process.kill()
        process.wait()


def start(struck, tiny, folder, kind, phase, rank, *more, env=None):
    output = folder / f"output-{len(struck.processes)}"
    with output.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "picotron_core.cli", "train", *tiny, "--plugin", "faults"),
                *("--run.dir", str(folder), "--name", "struck", "--train.steps", "100000"),
                *("--checkpoint.every", "2", "--run.timeout_s", str(TIMEOUT_S), *more),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(FAULTS),
                "FAULT": f"{kind} {phase} {rank} {struck.fault}",
                **(env or {}),
            },
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    struck.processes.append(process)
    struck.outputs.append(output)


def start_ranks(struck, tiny, folder, kind, phase, rank, size, *more):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in range(size):
        variables = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        start(struck, tiny, folder, kind, phase, rank, *more, env=variables)


def victim_of(phase: str, size: int) -> int:
    """The rank that writes, in a save; else the last."""
    return 0 if phase == "save" else size - 1


def place(kind: str, phase: str) -> str:
    """A save goes on in the background, while the next steps are made; and a rank that was stopped
    takes part again, once it is woken, until it hears that the run is over.
    """
    return r"step \d+" if kind == "stop" or phase == "save" else "step 2"


def waits(phase: str) -> str:
    """And of a save the ranks tell each other through the store."""
    collective = r"\w+ over \w+"
    return f"({collective}|the wait for '.*')" if phase == "save" else collective


@pytest.mark.parametrize(("kind", "phase", "size"), EVERY)
def test_all_others_leave_in_time_and_say_why(struck, tiny, tmp_path, request, kind, phase, size):
    if (kind, phase, size) not in IN_CI and not request.config.getoption("--every-failure"):
        pytest.skip("asked by make failures")
    victim = victim_of(phase, size)
    more = LAYOUTS[phase] if size == 4 else ()
    start_ranks(struck, tiny, tmp_path, kind, phase, victim, size, *more)
    end = struck.wait_for_the_fault()
    for rank in set(range(size)) - {victim}:
        code = struck.processes[rank].wait(max(0, end - time.monotonic()))
        text = struck.text(rank)
        assert code == 1, text
        (told,) = re.findall(rf"^error: (Rank {rank} stops in .*)", text, re.M)
        assert re.match(f"Rank {rank} stops in {place(kind, phase)}, in {waits(phase)}", told), told
        if kind == "raise":
            assert re.search(
                f"Rank {victim} failed in {place(kind, phase)}: ValueError: struck", told
            )
        elif victim == 0:  # which keeps the store
            assert "the store does not answer, which rank 0 keeps: killed or stopped" in told
        else:
            assert re.search(rf"rank {victim}, last in .*, is not heard of any more", told)
        assert "Traceback" not in text
    if kind == "raise":
        assert struck.processes[victim].wait(max(0, end - time.monotonic())) == 1
        assert f"ValueError: struck in {phase}" in struck.text(victim)
        assert re.search(rf"That was rank {victim}, in {place(kind, phase)}\.", struck.text(victim))


@pytest.mark.parametrize(("kind", "phase"), [(kind, phase) for kind, phase, n in EVERY if n == 2])
def test_the_launcher_leaves_in_time_and_leaves_nobody(
    struck, tiny, tmp_path, request, kind, phase
):
    if (kind, phase) != ("stop", "forward") and not request.config.getoption("--every-failure"):
        pytest.skip("asked by make failures")
    victim = victim_of(phase, 2)
    start(struck, tiny, tmp_path, kind, phase, victim, "--nproc", "2")
    end = struck.wait_for_the_fault()
    ranks = children_of(struck.processes[0].pid)
    code = struck.processes[0].wait(max(0, end - time.monotonic()))
    text = struck.text(0)
    assert code == 1, text
    assert re.search(f"Rank {1 - victim} stops in {place(kind, phase)}, in {waits(phase)}", text), (
        text
    )
    if kind == "raise":
        assert f"ValueError: struck in {phase}" in text
    else:
        assert re.search(rf"rank {victim}, last in .*, is not heard of any more", text)
    if kind == "kill":
        assert f"Rank {victim} died of SIGKILL" in text
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("kind", ["kill", "stop", "raise"])
def test_a_transport_that_does_not_come_back_is_left(struck, tiny, tmp_path, request, kind):
    """As NCCL's collectives, and the leaving of its groups, from which no error brings one back."""
    if kind != "raise" and not request.config.getoption("--every-failure"):
        pytest.skip("asked by make failures")
    clinging = ("--backends", "comm=faults/clinging")
    start_ranks(struck, tiny, tmp_path, kind, "forward", 1, 2, *clinging)
    end = struck.wait_for_the_fault()
    assert struck.processes[0].wait(max(0, end - time.monotonic())) == 1
    assert "error: Rank 0 stops in step 2, in all_reduce over" in struck.text(0)
    if kind == "raise":
        assert "Rank 1 failed in step 2: ValueError: struck in forward" in struck.text(0)
        assert struck.processes[1].wait(max(0, end - time.monotonic())) == 1
    else:
        assert re.search("rank 1, last in .*, is not heard of any more", struck.text(0))


def test_a_rank_that_is_stuck_where_it_waits_for_nobody_leaves_too(struck, tiny, tmp_path):
    """As where NCCL's collectives have filled a GPU's queue: in any kernel."""
    start_ranks(struck, tiny, tmp_path, "kill", "forward", 1, 2, "--backends", "comm=faults/queued")
    end = struck.wait_for_the_fault()
    assert struck.processes[0].wait(max(0, end - time.monotonic())) == 1
    text = struck.text(0)
    assert re.search(r"error: Rank 0 stops in step 2: rank 1, last in .*, is not heard of", text)


def test_a_launchers_signal_makes_a_rank_speak_that_does_not_come_back(
    struck, tiny, tmp_path, request
):
    """Long before the timeout, and before the launcher kills it half a minute later."""
    if not request.config.getoption("--every-failure"):
        pytest.skip("asked by make failures")
    more = ("--backends", "comm=faults/clinging", "--run.timeout_s", "60", "--nproc", "2")
    start(struck, tiny, tmp_path, "kill", "forward", 1, *more)
    end = struck.wait_for_the_fault()
    assert struck.processes[0].wait(max(0, end - time.monotonic())) == 1
    assert "error: Rank 0 stops in step 2, in all_reduce over" in struck.text(0)
    assert "Rank 1 died of SIGKILL" in struck.text(0)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
