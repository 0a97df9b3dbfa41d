"""Ranks of one machine as an attacker, a terminal and a killed launcher find them."""

from __future__ import annotations

import os
import pickle
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from picotron_core.cli.stop import SAME_S

WAIT_S = 300  # ends a hang: no promise
NOBODY = 65534
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@dataclass(kw_only=True)
class Group:
    """A command with all the processes that come of it, known by a variable that they inherit."""

    process: subprocess.Popen[bytes]
    output: Path
    temporary: Path
    mark: bytes

    def text(self) -> str:
        return self.output.read_text()

    def pids(self) -> dict[int, str]:
        """Process id -> RANK, or ""; of those that have not ended."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has just ended
                continue
            if self.mark in variables and state != "Z":
                rank = next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), "")
                found[int(folder.name)] = rank
        return found

    def ranks(self) -> list[int]:
        return sorted(pid for pid, rank in self.pids().items() if rank)

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def leaves_nothing(self) -> None:
        until(lambda: not self.pids(), self)
        assert not list(self.temporary.iterdir())


def until(holds, group: Group) -> None:
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, group.text()
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    groups: list[Group] = []

    def begin(*arguments: str, stdin=subprocess.DEVNULL, **more: object) -> Group:
        temporary = tmp_path / "tmp"
        temporary.mkdir(exist_ok=True)
        mark, output = f"GROUP={uuid.uuid4().hex}", tmp_path / f"output-{len(groups)}"
        name, _, value = mark.partition("=")
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "picotron_core.cli", *arguments],
                env={**os.environ, name: value, "TMPDIR": str(temporary)},
                stdin=stdin,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                **more,
            )
        group = Group(process=process, output=output, temporary=temporary, mark=mark.encode())
        groups.append(group)
        return group

    yield begin
    for group in groups:
        for pid in (group.process.pid, *group.pids()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        group.process.wait()


def train(tiny, *more: str) -> tuple[str, ...]:
    ranks = ("--nproc", "2", "--name", "two", "--run.timeout_s", "20", "--checkpoint.every", "0")
    return ("train", *tiny, *ranks, "--train.steps", "1000000", *more)


@dataclass
class Listening:
    """The sockets of some processes that wait for whoever comes."""

    addresses: set[str] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)


def listening(pids) -> Listening:
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
            except OSError:  # closed meanwhile
                continue
    found = Listening()
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.addresses.add(address)
                found.ports.add(int(port, 16))
    return found


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def step_of(group: Group) -> bool:
    return "step " in group.text()


def gloo_listens(group: Group) -> bool:
    return bool(listening(group.ranks()).ports)


@pytest.mark.parametrize(
    "command",
    [
        "train",
        pytest.param("compare dp-zero", marks=pytest.mark.slow),
        pytest.param("verify-resume", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_open_to_others_and_a_killed_command_leaves_nothing(start, tiny, command):
    if command == "train":
        group = start(*train(tiny))
    else:
        steps = ("--steps", "100000") if command == "verify-resume" else ("--steps", "1000")
        group = start(*command.split(), *tiny, "--nproc", "2", "--run.timeout_s", "20", *steps)
    until(lambda: gloo_listens(group), group)
    found = listening(group.pids())
    assert found.addresses <= LOOPBACK
    folders = [path for path in group.temporary.iterdir() if path.name.startswith("picotron-")]
    assert folders
    for folder in folders:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not [path for path in group.temporary.iterdir() if path not in folders]
    group.process.kill()  # not its ranks
    group.wait()
    group.leaves_nothing()
    assert "Traceback" not in group.text()


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def connect_as_nobody(ports, data: bytes) -> None:
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        for port in ports:
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(data)
        os._exit(0)
    finally:
        os._exit(1)


def test_what_a_stranger_writes_into_gloos_ports_runs_nothing(start, tiny, tmp_path):
    group = start(*train(tiny, "--parallel.pp", "2"))
    until(lambda: step_of(group), group)
    ports, owned = listening(group.ranks()).ports, tmp_path / "owned"
    for data in (
        pickle.dumps(Command(owned)),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        bytes(range(256)) * 300,
        b"\xff" * 4096,
        b"\0" * 64,
    ):
        try:
            connect_as_nobody(ports, data)
        except AssertionError:  # the port was closed: a run may fail of it
            break
    if group.process.poll() is None:
        group.process.send_signal(signal.SIGTERM)
    code = group.wait()
    text = group.text()
    assert code in (1, 75), text
    assert "Traceback" not in text
    if code == 1:
        assert re.search("^error: ", text, re.M), text
    assert not owned.exists()
    group.leaves_nothing()


def test_a_stopped_rank_outlives_no_launcher_that_is_killed_before_they_meet(start, tiny):
    group = start(*train(tiny))
    until(lambda: len(group.ranks()) == 2, group)
    victim = group.ranks()[1]
    os.kill(victim, signal.SIGSTOP)
    until(lambda: met(group), group)
    group.process.kill()
    group.wait()
    group.leaves_nothing()


def met(group: Group) -> bool:
    """Whether a rank waits in the folder."""
    return any(group.temporary.glob("picotron-*/store"))


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "Interrupted."),
        (signal.SIGTERM, 75, "Stopped by SIGTERM."),
        pytest.param(signal.SIGHUP, 75, "Stopped by SIGHUP.", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_hear_nothing_yet_do_not_hold_up_a_stop(start, tiny, number, code, words):
    group = start(*train(tiny))
    until(lambda: len(group.ranks()) == 2, group)
    for pid in group.ranks():  # as deaf as in the training of a tokenizer
        os.kill(pid, signal.SIGSTOP)
    group.process.send_signal(number)
    assert group.wait() == code
    assert words in group.text()
    assert "Traceback" not in group.text()
    group.leaves_nothing()


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminals_ctrl_c_reaches_each_rank_once(start, tiny, tmp_path, times):
    """The first saves, the second quits without; both are sent to the whole foreground group."""
    keyboard, terminal = pty.openpty()

    def take_the_terminal():
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    group = start(*train(tiny), stdin=terminal, preexec_fn=take_the_terminal)
    os.close(terminal)
    until(lambda: step_of(group), group)
    for _ in range(times):
        os.write(keyboard, b"\x03")
        until(lambda: "Stopping after this step" in group.text(), group)
        time.sleep(SAME_S if times > 1 else 0)
    assert group.wait() == 130
    saved = list((tmp_path / "runs" / "two" / "checkpoints").glob("step-*"))
    assert times > 1 or len(saved) == 1
    assert group.text().count("Stopping after this step") == 1
    assert "Traceback" not in group.text()
    group.leaves_nothing()
    os.close(keyboard)


def test_more_ranks_than_a_machine_can_start_are_refused(picotron, tiny):
    code, _, err = picotron("train", *tiny, "--nproc", str(2**63))
    assert code == 2
    assert "Invalid value for '--nproc'" in err
