"""How far a run is, from its folder alone; torch is not needed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from picotron_core.engine.run_directory import RunDirectory, read_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """saved: the step of the newest checkpoint, 0 where there is none. None: not measured yet.

    loss, val_loss, bits_per_byte: the latest. tokens_per_s, step_s, mfu: the median over all steps,
    which the first ones and a busy moment do not move. peak_memory_bytes: of rank 0.
    """

    step: int = 0
    saved: int = 0
    tokens: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None


def progress(run: Path) -> Progress:
    lines = list(read_metrics(RunDirectory(run)))
    steps = [line for line in lines if line.get("loss") is not None]
    evaluations = [line for line in lines if "val_loss" in line]
    names = (path.name.removeprefix("step-") for path in run.glob("checkpoints/step-*"))
    saved = [int(step) for step in names if step.isdecimal()]
    latest = {**(evaluations[-1] if evaluations else {}), **(steps[-1] if steps else {})}

    def middle(key: str) -> float | None:
        values = [line[key] for line in steps if line.get(key) is not None]
        return median(values) if values else None

    return Progress(
        step=latest.get("step", 0),
        saved=max(saved, default=0),
        tokens=latest.get("tokens"),
        loss=latest.get("loss"),
        val_loss=latest.get("val_loss"),
        bits_per_byte=latest.get("bits_per_byte"),
        tokens_per_s=middle("tokens_per_s"),
        step_s=middle("step_s"),
        mfu=middle("mfu"),
        peak_memory_bytes=max((line["peak_memory_bytes"] for line in steps), default=None),
    )


def settings_of(config: Path) -> Mapping[str, Any]:
    """A config that Picotron wrote, flat: {"train.lr": 0.001}."""
    return dict(_flat(tomllib.loads(config.read_text(encoding="utf-8")), ""))


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
