"""The ranks' trace files, as records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picotron_core.errors import ConfigError, DamagedFileError

ROUNDING_MS = 1e-6  # a file has nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """kind: phase, op, comm or wait. start, end: in ms, on the clock that all ranks share."""

    name: str
    kind: str
    start: float
    end: float
    facts: dict[str, Any]

    @property
    def ms(self) -> float:
        return self.end - self.start

    def lies_in(self, other: Happening) -> bool:
        return other.start - ROUNDING_MS <= self.start and self.end <= other.end + ROUNDING_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One rank's. about: its place, the degrees of the axes, the settings; see engine/trace.py."""

    path: Path
    about: dict[str, Any]
    happenings: tuple[Happening, ...]

    @property
    def rank(self) -> int:
        return int(self.about["rank"])

    def place(self, axis: str) -> int:
        return int(self.about["place"][axis])

    def degree(self, axis: str) -> int:
        return int(self.about["degrees"][axis])

    @property
    def steps(self) -> list[Happening]:
        """Those that were recorded to their end."""
        return [h for h in self.happenings if h.name == "step" and "unfinished" not in h.facts]

    def within(self, span: Happening, *, kind: str, names: Sequence[str] = ()) -> list[Happening]:
        """What lies in a span, of a kind and, where names are given, of one of them."""
        return [
            h
            for h in self.happenings
            if h.kind == kind and h.name in (names or [h.name]) and h.lies_in(span)
        ]


def read_recordings(run: Path) -> list[Recording]:
    """Of all ranks of a run, in order.

    Raises: ConfigError where the run was not traced, or a rank's file is elsewhere;
        DamagedFileError.
    """
    folder = run / "trace"
    paths = sorted(folder.glob("rank-*.json"))
    if not paths:
        raise ConfigError(
            f"{run} has no trace: no {folder}/rank-0000.json. Record one with "
            "`picotron train ... --trace`, which takes the third and the fourth step."
        )
    recordings = [_read(path) for path in paths]
    ranks = {recording.rank for recording in recordings}
    missing = sorted(set(range(int(recordings[0].about["world_size"]))) - ranks)
    if missing:
        raise ConfigError(
            f"{folder} lacks the traces of the ranks {', '.join(map(str, missing))}. Copy them "
            "there from the machines that they ran on."
        )
    if not all(recording.steps for recording in recordings):
        raise ConfigError(f"{folder} holds no whole step: the run ended before. Trace it anew.")
    return recordings


def _read(path: Path) -> Recording:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for entry in document["traceEvents"] if entry["ph"] == "X"]
        happenings = tuple(
            Happening(
                name=entry["name"],
                kind=entry["cat"],
                start=entry["ts"] / 1000,
                end=(entry["ts"] + entry["dur"]) / 1000,
                facts=entry["args"],
            )
            for entry in entries
        )
        return Recording(path=path, about=document["otherData"], happenings=happenings)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{path} is no trace of Picotron's ({type(error).__name__}: {error}). Trace anew."
        ) from None
