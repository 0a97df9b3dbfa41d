"""Child processes that examine what may kill them, and what one that died was doing.

The child writes a JSON line before and after each thing that it does, so a death accuses one thing;
the next child does the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from picotron_core.files import replace_text
from picotron_core.parallel.lifeline import Starter, starter

Record = dict[str, Any]

EXAMINER = "picotron_core.cli.doctor.examine"
IMPORT_S = 300.0  # from a cold network disk torch takes minutes
SILENCE_S = 120.0  # any other single thing takes seconds
ENDS = ("end", "again")  # it came to its end; or it asks for another that goes on
MAX_DEATHS = 8  # each costs another import of torch
SURVIVABLE = ("plugins", "launch", "rate")  # what the next child can leave out


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the child is to do; it travels as JSON."""

    config: Record  # picotron's, as data
    rules: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    launch: bool = True  # False: a simulated device; nothing is launched
    plugins: bool = True  # False: loading them killed the child before
    settled: tuple[str, ...] = ()  # keys of launches and rates that need not be done again


@dataclass(frozen=True, slots=True)
class Death:
    """What a child was doing when it died, and of what."""

    doing: Record
    cause: str  # "died of SIGILL", "gave no sign of life for 120 s"
    evidence: str  # the last that it wrote


@dataclass(slots=True)
class Findings:
    """All that the children said, and how those died that did."""

    records: list[Record] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    complete: bool = False

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["done"] == kind]


def key_of(record: Record) -> str:
    """Names a launch or a rate among all: what a later child leaves out."""
    return "/".join(str(record.get(part, "")) for part in ("place", "op", "backend", "dtype"))


def examine_in_children(
    task: Task,
    command: Sequence[str] = (),
    *,
    import_s: float = IMPORT_S,
    silence_s: float = SILENCE_S,
) -> Findings:
    """Let children examine this machine until one comes to its end, or too many died."""
    command = command or [sys.executable, "-P", "-X", "faulthandler", "-m", EXAMINER]
    findings = Findings()
    with starter() as start:
        while True:
            records, death = _run_one(task, command, start, (import_s, silence_s))
            _add(findings, records)
            if death is None and records[-1]["done"] == "end":
                findings.complete = True
                return findings
            if death is not None:
                findings.deaths.append(death)
                if death.doing["begin"] not in SURVIVABLE or len(findings.deaths) >= MAX_DEATHS:
                    return findings
            settled = [key_of(record) for record in findings.records if _is_trial(record["done"])]
            settled += [key_of(d.doing) for d in findings.deaths if _is_trial(d.doing["begin"])]
            if death is None and len(settled) == len(task.settled):
                return findings  # it asked for another child without having done anything
            plugins = task.plugins and (death is None or death.doing["begin"] != "plugins")
            task = replace(task, settled=tuple(settled), plugins=plugins)


def _is_trial(kind: str) -> bool:
    return kind in ("launch", "rate")


def _add(findings: Findings, records: Sequence[Record]) -> None:
    """Each child begins with the same things: the latest account of them is kept."""
    again = {record["done"] for record in records if not _is_trial(record["done"])}
    findings.records = [record for record in findings.records if record["done"] not in again]
    findings.records += records


def _run_one(
    task: Task, command: Sequence[str], start: Starter, limits: tuple[float, float]
) -> tuple[list[Record], Death | None]:
    """One child: what it said, and its death if it had not finished."""
    question, answers = start.folder.path / "task.json", start.folder.path / "answers.jsonl"
    replace_text(question, json.dumps(_as_record(task)))
    replace_text(answers, "")
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, str(question), str(answers)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it started dies with it
            env={**os.environ, **start.variables},
            pass_fds=start.descriptors,
        )
        try:
            hung = _wait(process, answers, limits)
        finally:
            _kill(process)  # if it hangs, or somebody pressed Ctrl-C
        output.seek(0)
        written = output.read().decode(errors="replace")
    done, doing = _read(answers)
    if done and done[-1]["done"] in ENDS:  # how it dies after that matters to nobody
        return done, None
    return done, Death(doing or {"begin": "start"}, hung or _cause(process), _evidence(written))


def _as_record(task: Task) -> Record:
    return {name: getattr(task, name) for name in Task.__slots__}


def _wait(process: subprocess.Popen[bytes], answers: Path, limits: tuple[float, float]) -> str:
    """Wait for the end; "" or, if it was silent for too long, what to say of that."""
    size, limit, deadline = -1, limits[0], time.monotonic() + limits[0]
    while process.poll() is None:
        if (now_has := answers.stat().st_size) != size:
            size = now_has
            _, doing = _read(answers)
            limit = limits[doing is not None and doing["begin"] != "torch"]
            deadline = time.monotonic() + limit
        if time.monotonic() > deadline:
            return f"gave no sign of life for {limit:g} s"
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    return ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a child that still runs, with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(answers: Path) -> tuple[list[Record], Record | None]:
    """What was done, and what was begun and not done."""
    done: list[Record] = []
    doing: Record | None = None
    for line in answers.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):  # it was cut off, or is being written
            break
        record = json.loads(line)
        if "begin" in record:
            doing = record
        else:
            done.append(record)
            if record["done"] != "trouble":  # which is met in the midst of something
                doing = None
    return done, doing


def _cause(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-code}"
    return f"died of {name}" + (" (killed: out of memory?)" if -code == signal.SIGKILL else "")


def _evidence(written: str) -> str:
    """The innermost Python line of a fatal signal, or the last line of a traceback."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    if any(line.startswith("Fatal Python error") for line in lines):
        frames = [line for line in lines if line.startswith("File ")]
        return frames[0] if frames else ""
    return lines[-1] if lines else ""
