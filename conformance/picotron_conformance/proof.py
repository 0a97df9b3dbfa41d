"""One pytest session that proves backends: its questions, its answers, and what it writes down."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from picotron_conformance.answers import Answers
from picotron_conformance.certificate import write_certificate
from picotron_conformance.check import Check, Outcome, Profile, Target, Verdict
from picotron_conformance.collecting import Collecting, id_of
from picotron_conformance.differences import Now
from picotron_conformance.documents import plain
from picotron_conformance.imports import Imports
from picotron_conformance.installed import Installed
from picotron_conformance.matrix import of_limit, worst_of
from picotron_conformance.ranks.world import end_all
from picotron_conformance.report import (
    BROKEN,
    by_backend,
    failure,
    key_of,
    reproduce,
    tally,
    write_report,
)
from picotron_conformance.run import ask, check_id, outcome_of, plan, target_of
from picotron_conformance.selection import Chosen, choose
from picotron_conformance.session import Session, gather_session, rest_on
from picotron_core.errors import PicotronError
from picotron_core.hardware import Device, look
from picotron_core.registry.types import Candidate

# The user properties that carry an outcome, and what it rests on, from an xdist worker.
ANSWER, RESTS_ON = "picotron", "picotron-rests-on"


@dataclass(frozen=True, slots=True)
class Question:
    candidate: Candidate
    check: Check

    @property
    def id(self) -> str:
        return check_id(self.candidate, self.check)


def start(config: pytest.Config) -> Proof:
    """Raises: PicotronError for options that cannot be meant."""
    profile: Profile = config.getoption("--picotron-profile")
    seed = config.getoption("--picotron-seed")
    worker = getattr(config, "workerinput", None)  # of pytest-xdist
    if worker is not None:
        seed = worker["picotron_seed"]
    elif seed is None:
        seed = secrets.randbelow(2**31) if profile == "fuzz" else 0
    chosen = choose(config.getoption("--picotron-backend"))
    device = look(config.getoption("--picotron-device"))
    session = gather_session(
        chosen.candidates,
        device=device,
        profile=profile,
        seed=seed,
        command=("pytest", *config.invocation_params.args),
        named=chosen.named,
    )
    if device.type == "cpu":
        # Cases are small: a second thread costs more than it brings, on a busy machine ten times as
        # much. The check "threads" asks with all of them.
        torch.set_num_threads(1)
    collecting = Collecting(config)
    config.pluginmanager.register(collecting, "picotron-collecting")
    return Proof(config, chosen, device, session, worker is not None, collecting)


@dataclass(eq=False)
class Proof:
    """Registered with pytest: its hooks gather the answers of this process and of its workers."""

    config: pytest.Config
    chosen: Chosen
    device: Device
    session: Session
    is_worker: bool
    collecting: Collecting
    answers: Answers = field(default_factory=Answers)
    given: dict[str, list[str]] = field(default_factory=dict)  # by id, what this process answered
    imports: Imports = field(default_factory=Imports)
    rests_on: dict[str, list[Installed]] = field(default_factory=dict)  # by key
    closing: list[str] = field(default_factory=list)  # lines to print at the end
    unwritten: bool = False  # a file that was asked for could not be written

    @cached_property
    def questions(self) -> list[Question]:
        found = [
            Question(candidate, check)
            for candidate in self.chosen.candidates
            for check in plan(
                candidate.backend.op,
                device=self.device,
                profile=self.session.profile,
                seed=self.session.seed,
            )
        ]
        assert len({question.id for question in found}) == len(found), "two checks share an id"
        return found

    def answer(self, question: Question, node: pytest.Item) -> None:
        """Ask, write the outcome down where the controller finds it, and tell pytest."""
        load = self._loader(question.candidate)
        asked = partial(ask, question.candidate, question.check, load)
        with self.imports.watched(question.candidate) as imported:
            outcome = asked(device=self.device, hung=self._hung)
        outcome = replace(outcome, reproduce=reproduce(outcome, self.session))
        # All that it was ever answered: who has a test run again may throw the first answer away.
        given = self.given.setdefault(question.id, [])
        given.append(json.dumps(plain(outcome)))
        node.user_properties += [(ANSWER, answer) for answer in given]
        node.user_properties.append((RESTS_ON, json.dumps([key_of(outcome), plain(imported)])))
        if outcome.verdict in BROKEN:
            pytest.fail(_told(outcome), pytrace=False)
        if outcome.verdict is not Verdict.PASS:
            pytest.skip(f"{outcome.verdict}: {outcome.detail}")

    @cached_property
    def _loader(self) -> Any:
        @cache
        def loader(candidate: Candidate) -> Any:
            session = self.session
            make = partial(
                target_of,
                candidate,
                device=self.device,
                profile=session.profile,
                seed=session.seed,
            )

            def load() -> Target:
                target = make()
                self.imports.kernels[candidate] = target.kernel
                return target

            return cache(load)

        return loader

    def _hung(self, outcome: Outcome) -> None:
        """Native code that never returns: write down what is known and end this process."""
        print(f"\n{outcome.id}: {outcome.detail}; this process ends.", file=sys.stderr, flush=True)
        if not self.is_worker:
            self.answers.add(outcome)
            self._write(self._outcomes())
        end_all()
        os._exit(1)

    # The rest are pytest's hooks; the second and third are pytest-xdist's.

    def pytest_report_header(self) -> list[str]:
        backends = [f"{c.backend.op}={c.qualified_name}" for c in self.chosen.candidates]
        return [f"picotron: {self._how}", f"picotron: proving {', '.join(backends)}"]

    @property
    def _how(self) -> str:
        return f"profile {self.session.profile}, seed {self.session.seed}, on {self.device}"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["picotron_seed"] = self.session.seed

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        for question in self.questions:
            if question.id == id_of(crashitem):
                detail = f"it killed its process: {report.longrepr}"
                self.answers.add(_unanswered(question, Verdict.ERROR, detail))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == ANSWER:
                self.answers.add(TypeAdapter(Outcome).validate_json(str(value)))
            elif name == RESTS_ON:
                key, found = TypeAdapter(tuple[str, list[Installed]]).validate_json(str(value))
                self.rests_on.setdefault(key, []).extend(found)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        end_all()
        if self.is_worker or self.config.option.collectonly:
            return
        outcomes = self._outcomes()
        self.closing += self.answers.contradictions()
        self._write(outcomes)
        why = failure(outcomes, named=self.chosen.named)
        if why:
            self.closing.append(why)
        if why or self.unwritten:
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.is_worker or self.config.option.collectonly:
            return
        terminalreporter.section("picotron")
        terminalreporter.write_line(self._how)
        for key, checks in by_backend(self._outcomes()).items():
            counts = ", ".join(f"{n} {verdict}" for verdict, n in tally(checks).items() if n)
            worst = worst_of(checks)
            nearest = "" if worst is None else f"; at worst {of_limit(worst)} of a limit"
            terminalreporter.write_line(f"{key}: {counts}{nearest}")
        for line in self.closing:
            terminalreporter.write_line(line)

    def _outcomes(self) -> list[Outcome]:
        """One for each question; what was not asked is NOT_RUN."""
        return [
            self.answers.worst.get(question.id)
            or _unanswered(question, Verdict.NOT_RUN, self.collecting.why_not(question.id))
            for question in self.questions
        ]

    def _write(self, outcomes: Sequence[Outcome]) -> None:
        complete = all(question.id in self.answers.worst for question in self.questions)
        session = rest_on(replace(self.session, complete=complete), self.rests_on)
        objections = list(self.answers.contradictions())
        if self.config.getoption("--picotron-certificate"):
            objections += _changed(session)
        session = replace(session, objections=tuple(objections))
        try:
            if path := self.config.getoption("--picotron-report"):
                write_report(Path(path), session, outcomes)
                self.closing.append(f"report: {path}, to read with: picotron conformance {path}")
            if path := self.config.getoption("--picotron-certificate"):
                write_certificate(Path(path), session, outcomes)
                self.closing.append(f"certificate: {path}")
        except (PicotronError, OSError) as error:
            self.closing.append(f"error: {error}")
            self.unwritten = True


def _unanswered(question: Question, verdict: Verdict, detail: str) -> Outcome:
    return outcome_of(question.candidate, question.check, verdict, detail=detail)


def _changed(session: Session) -> Iterator[str]:
    """What was certified must be what ran: nothing may be edited in the meantime."""
    now = Now()
    for backend in session.backends:
        for line in now.differences(backend):
            yield f"{backend.key} was changed while it was asked, or is not what it seems: {line}."


def _told(outcome: Outcome) -> str:
    """What broke, what that looks like, and how to see it again."""
    lines = [f"{outcome.verdict}: {outcome.detail}"]
    lines += [f"looks like: {outcome.hint}"] if outcome.hint else []
    return "\n".join([*lines, outcome.reproduce])
