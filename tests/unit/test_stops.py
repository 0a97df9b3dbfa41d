"""However a run is stopped, and whatever becomes of its console and its folder: no step is lost,
the exit code says what happened, and nothing half-made is left.

Real processes, signals, pipes and terminals. Each is waited for by what it writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zygote import CLOSED, WAIT_S, Command, Zygote

from picotron_core.checkpoint.save import Saver
from picotron_core.cli import train
from picotron_core.cli.job import Job
from picotron_core.cli.stop import SAME_S

LONG = ("--train.steps", "1000000", "--checkpoint.every", "0", "--name", "a")
SHORT = ("--train.steps", "6", "--checkpoint.every", "2", "--name", "a")


def slow(value: object) -> object:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path, tiny: tuple[str, ...]) -> Callable[..., Command]:
    """`picotron train` of the tiny model, in an empty folder."""

    def begin(*arguments: str, **how: object) -> Command:
        given = () if "--resume" in arguments else tiny
        return zygote.start("train", *given, *arguments, cwd=tmp_path, **how)

    return begin


def steps_of(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def until_steps(command: Command, run: Path, more: int = 2) -> None:
    """Until it has trained so many more steps."""
    metrics = run / "metrics.jsonl"
    command.until(metrics)
    before = metrics.read_text().count("\n")
    command.until_true(lambda: metrics.read_text().count("\n") >= before + more)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Signals while it trains.


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", slow("SIGUSR2"), slow("SIGTERM")])
def test_a_signal_saves_the_step_that_is_under_way(start, tmp_path, name):
    run = tmp_path / "runs" / "a"
    command = start(*LONG)
    until_steps(command, run)
    command.send(getattr(signal, name))
    assert command.wait() == 75
    assert f"Stopping for {name} after this step" in command.text()
    assert saved(run) == [f"step-{steps_of(run)[-1]:08d}"]
    log = (run / "log.txt").read_text()
    assert f"Stopping for {name} after this step" in log
    assert "picotron train --resume runs/a" in log


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(start, tmp_path, number):
    """SIGHUP as under nohup; SIGINT as of a script's background job, where there is a terminal."""
    run = tmp_path / "runs" / "a"
    main, side = pty.openpty()
    command = start(*LONG, ignored=[number], files={0: os.ttyname(side)}, terminal=True)
    until_steps(command, run)
    command.send(number)
    until_steps(command, run, 5)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    assert command.text().count("Stopping") == 1
    assert len(saved(run)) == 1
    os.close(main)
    os.close(side)


def test_a_script_that_ignores_sigterm_and_sigint_for_itself_can_still_stop_its_run(
    start, tmp_path
):
    """Without a terminal there is no Ctrl-C: SIGINT was sent to the run itself."""
    run = tmp_path / "runs" / "a"
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        command = start(*LONG, "--run.resume", "true", ignored=[signal.SIGTERM, signal.SIGINT])
        until_steps(command, run)
        command.send(number)
        assert command.wait() == code
        assert saved(run)[-1] == f"step-{steps_of(run)[-1]:08d}"


def test_ctrl_c_twice_quits_even_in_a_step_that_does_not_end(start, tmp_path):
    run = tmp_path / "runs" / "a"
    command = start(*LONG, "--train.accumulation", "65536")
    command.until_true((run / "checkpoints").exists)
    for _ in range(2):  # one Ctrl-C, of which a launcher and a scheduler have told
        command.send(signal.SIGINT)
        command.until(run / "log.txt", "Stopping after this step")
    time.sleep(SAME_S)
    assert command.is_running()
    command.send(signal.SIGINT)
    assert command.wait() == 130
    assert "Traceback" not in command.text()


def test_an_evaluation_is_left_for_a_signal(start, tmp_path):
    run = tmp_path / "runs" / "a"
    endless = ("--train.eval_every", "2", "--train.eval_samples", "10000000")
    many = ("--data.val_fraction", "0.5", "--data.seq_len", "2", "--train.micro_batch", "1")
    command = start(*LONG, *endless, *many)
    command.until_true(lambda: len(steps_of(run)) if (run / "metrics.jsonl").exists() else 0)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    assert saved(run) == [f"step-{steps_of(run)[-1]:08d}"]
    assert "val_loss" not in (run / "metrics.jsonl").read_text()


# Before the first step.

BEFORE = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]


def code_of(number: int) -> int:
    return 130 if number == signal.SIGINT else 75


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Text that takes a while to read and to tokenise."""
    path = tmp_path_factory.mktemp("long") / "text.txt"
    path.write_text("".join(f"{n % 91} times {n % 7} is in the table\n" for n in range(200_000)))
    return path


@pytest.mark.parametrize("number", [*BEFORE[::3], *map(slow, BEFORE[1:3])])
def test_a_signal_ends_a_run_that_reads_and_tokenises(start, text, tmp_path, number):
    cache = tmp_path / "cache"
    data = ("--data", str(text), "--data.cache_dir", str(cache))
    command = start("--name", "a", *data)
    command.until(command.out, "data   ")
    command.send(number)
    assert command.wait() == code_of(number)
    assert command.text().splitlines()[-1].startswith(("Interrupted.", "Stopped by SIG"))
    assert "Traceback" not in command.text()
    assert not list(tmp_path.glob("runs/*"))
    assert not list(cache.glob("**/tokenizer.json"))  # neither whole tokens nor half of them


@pytest.mark.parametrize("number", BEFORE[::3])
def test_a_signal_ends_a_run_that_waits_for_another(start, tmp_path, number):
    lock = tmp_path / "runs" / "a" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = start("--name", "a", "--run.resume", "true")
        command.until(command.out, "is locked by")
        command.send(number)
        assert command.wait() == code_of(number)
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


@pytest.mark.parametrize("words", [["train"], slow(["plan"]), slow(["generate", "runs/a"])])
@pytest.mark.parametrize("number", BEFORE[::3])
def test_a_signal_during_the_imports_is_one_line(tiny, tmp_path, words, number):
    if words == ["plan"] and number != signal.SIGINT:
        pytest.skip("train and generate are enough")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.toml").touch()
    with subprocess.Popen(
        [sys.executable, "-m", "picotron_core.cli", *words, *(tiny if words == ["train"] else ())],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as command:
        maps = Path(f"/proc/{command.pid}/maps")
        while command.poll() is None and "libtorch_cpu" not in maps.read_text():
            pass
        command.send_signal(number)
        out, _ = command.communicate(timeout=WAIT_S)
    told = "Interrupted." if number == signal.SIGINT else "Stopped by SIGTERM."
    assert (command.returncode, out.strip()) == (code_of(number), told)


def test_a_signal_just_before_the_first_step_leaves_nothing(picotron, tiny, tmp_path, monkeypatch):
    saver = train._saver

    def stopped(job: Job) -> Saver:
        os.kill(os.getpid(), signal.SIGTERM)
        return saver(job)

    monkeypatch.setattr(train, "_saver", stopped)
    code, out, err = picotron("train", *tiny, "--name", "a")
    assert (code, err) == (75, "")
    assert "Stopped before the first step, nothing to save yet" in out
    assert not list(tmp_path.glob("runs/*"))


# A console that is closed, breaks or is full.

OUT, ERR = 1, 2


@pytest.mark.parametrize(
    "files",
    [
        {OUT: CLOSED},
        slow({ERR: CLOSED}),
        {0: CLOSED, OUT: CLOSED, ERR: CLOSED},
        slow({0: CLOSED, OUT: "/dev/full"}),
        {OUT: "/dev/full", ERR: "/dev/full"},
        {OUT: "pipe"},
        {OUT: "pipe", ERR: "pipe"},
    ],
    ids=str,
)
def test_a_console_that_takes_nothing_ends_no_run(start, tmp_path, files):
    pipe = tmp_path / "pipe"
    if "pipe" in files.values():
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command = start(*SHORT, "--run.sample", "def ", files=files)
    if pipe.exists():
        command.until_true(lambda: readable(reader))
        os.close(reader)  # as `head -1` does
    assert command.wait() == 0
    run = tmp_path / "runs" / "a"
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert saved(run)[-1] == "step-00000006"
    log = (run / "log.txt").read_text()
    for wanted in ("picotron/sdpa", "step      6  loss", "A sample", "loss.png", "Next:"):
        assert wanted in log
    for name, data in content(run).items():
        assert name == "log.txt" or b"step      6  loss" not in data, name


def readable(reader: int) -> bool:
    return bool(select.select([reader], [], [], 0)[0]) and bool(os.read(reader, 1))


def test_a_run_without_a_console_is_stopped_and_saved_and_resumed(start, tmp_path):
    run = tmp_path / "runs" / "a"
    for again in ((), ("--resume", "runs/a")):
        command = start(*(again or LONG), files={OUT: "/dev/full", ERR: CLOSED})
        until_steps(command, run)
        command.send(signal.SIGTERM)
        assert command.wait() == 75
        assert saved(run)[-1] == f"step-{steps_of(run)[-1]:08d}"
    assert (run / "log.txt").read_text().count("Stopped at step") == 2  # it is appended to


def test_a_terminal_that_is_closed_stops_a_run_unless_it_was_started_by_nohup(start, tmp_path):
    run = tmp_path / "runs" / "a"
    for ignored in ([signal.SIGHUP], []):
        main, side = pty.openpty()
        name = os.ttyname(side)
        console = {0: name, OUT: name, ERR: name}
        more = LONG if ignored else ("--resume", "runs/a", "--checkpoint.every", "0")
        command = start(*more, files=console, terminal=True, ignored=ignored)
        os.close(side)
        until_steps(command, run)
        os.close(main)  # SIGHUP, and from now on every write fails
        if ignored:
            until_steps(command, run, 5)
            command.send(signal.SIGUSR1)
        assert command.wait() == 75
        assert saved(run)[-1] == f"step-{steps_of(run)[-1]:08d}"
    assert "Stopping for SIGHUP after this step" in (run / "log.txt").read_text()


def test_a_reader_that_does_not_read_cannot_keep_a_run_from_saving(start, tmp_path):
    """As `picotron train | less`, when the scheduler sends SIGTERM."""
    run = tmp_path / "runs" / "a"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 16384)
    command = start(*LONG, "--run.log_every", "1", files={OUT: str(pipe)})
    until_steps(command, run)
    stuck = Path(f"/proc/{command.pid}/wchan")
    command.until_true(lambda: "select" in stuck.read_text() or "poll" in stuck.read_text())
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    assert saved(run) == [f"step-{steps_of(run)[-1]:08d}"]
    os.close(reader)


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_reader_that_does_not_read_cannot_keep_a_run_from_ending_before_its_first_step(
    start, tmp_path, number, ranks
):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    command = start("--name", "a", "--nproc", ranks, files={OUT: str(pipe), ERR: str(pipe)})
    command.until_true(lambda: list(tmp_path.glob("runs/a/*")))
    command.send(number)
    assert command.wait() == code_of(number)
    assert not list(tmp_path.glob("runs/*"))
    os.close(reader)
    os.close(writer)


# A run that is finished.


@pytest.mark.parametrize(
    ("steps", "ranks"),
    [
        ("6", "1"),
        ("4", "1"),
        pytest.param("6", "2", marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_that_is_started_again_ends_well(start, tmp_path, steps, ranks):
    run = tmp_path / "runs" / "a"
    again = (*SHORT, "--run.resume", "true")
    assert start(*again).wait() == 0
    before = content(run)
    command = start(*again, "--train.steps", steps, "--nproc", ranks)
    assert command.wait() == 0
    told = f"runs/a is finished: step 6 of {steps}. Nothing to do"
    assert command.text().count(told) == 1
    assert content(run) == before


def test_a_run_that_lacks_its_last_steps_trains_them_when_started_again(start, tmp_path):
    run = tmp_path / "runs" / "a"
    again = (*SHORT, "--run.resume", "true")
    assert start(*again).wait() == 0
    last = {path.name: path.read_bytes() for path in (run / "checkpoints/step-00000006").iterdir()}
    weights = run / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    for harm in (lambda: shutil.rmtree(weights.parent), lambda: weights.write_bytes(b"damaged")):
        harm()
        assert start(*again).wait() == 0
        assert weights.read_bytes() == last[weights.name]
        assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    code = start("--resume", "runs/a")
    assert code.wait() == 2
    assert "Give --train.steps above 6" in code.text()


# A folder that is gone.


def deleted(folder: Path) -> None:
    """Under another name, or a file that the run writes meanwhile would keep the folder."""
    shutil.rmtree(folder.rename(folder.with_name("deleted")))


def replaced(run: Path) -> None:
    deleted(run)
    (run / "checkpoints").mkdir(parents=True)


@pytest.mark.parametrize(
    "at_the_end", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["end", "save"]
)
@pytest.mark.parametrize(
    ("harm", "left"),
    [
        (deleted, None),
        (lambda run: run.rename(run.with_name("b")), None),
        (lambda run: deleted(run / "checkpoints"), "."),
        (replaced, "checkpoints"),
        (lambda run: (run / "checkpoints").rename(run / "kept"), "."),
    ],
    ids=["deleted", "moved", "checkpoints deleted", "replaced", "checkpoints moved"],
)
def test_a_folder_that_is_gone_is_an_error_and_is_not_made_again(
    start, tmp_path, harm, left, at_the_end
):
    run = tmp_path / "runs" / "a"
    every = "0" if at_the_end else "20"
    command = start(*LONG[:2], "--name", "a", "--checkpoint.every", every)
    until_steps(command, run)
    harm(run)
    if at_the_end:
        command.send(signal.SIGTERM)
    assert command.wait() == 1
    errors = [line for line in command.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "is gone: it was deleted, moved or replaced while the run trained" in errors[0]
    assert run.exists() == (left is not None)
    if left == "checkpoints":
        assert not list((run / left).iterdir())
    elif left:
        assert not (run / "checkpoints").exists()


def test_metrics_that_are_deleted_are_begun_anew_with_a_word(start, tmp_path):
    run = tmp_path / "runs" / "a"
    command = start(*LONG)
    until_steps(command, run)
    (run / "metrics.jsonl").unlink()
    until_steps(command, run)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    assert (run / "log.txt").read_text().count("metrics.jsonl was deleted; it is begun anew") == 1
    assert saved(run) == [f"step-{steps_of(run)[-1]:08d}"]


# Other commands.


def test_ctrl_c_ends_a_text_and_an_export_which_leaves_no_folder(start, zygote, tmp_path):
    assert start(*SHORT).wait() == 0
    writes = zygote.start(
        *("generate", "runs/a", "--prompt", "def ", "--max-new-tokens", "120"), cwd=tmp_path
    )
    writes.until(writes.out, "def ")
    writes.send(signal.SIGINT)
    assert writes.wait() in (0, 130)
    assert "Traceback" not in writes.text()
    for number in (signal.SIGINT, signal.SIGTERM):
        export = zygote.start("export", "runs/a", "out/model", cwd=tmp_path)
        export.until_true(lambda: (tmp_path / "out").exists())
        export.send(number)
        code = export.wait()
        assert code in (0, code_of(number))
        left = [path.name for path in (tmp_path / "out").iterdir()]
        assert left in ([], ["model"])  # nothing, or what was whole before the signal
        shutil.rmtree(tmp_path / "out")
