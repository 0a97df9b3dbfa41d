"""How far a run is, from its folder alone; torch is not needed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from picotron_core.engine.metrics_scan import Floats, scan
from picotron_core.engine.run_directory import RunDirectory

MEASURED = (
    *("loss", "val_loss", "bits_per_byte", "tokens"),
    *("tokens_per_s", "step_s", "mfu", "peak_memory_bytes"),
)


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
    """Raises: DamagedFileError that names the line of metrics.jsonl that is not one of a run's."""
    names = (path.name.removeprefix("step-") for path in run.glob("checkpoints/step-*"))
    saved = [int(step) for step in names if step.isdecimal()]
    parts: dict[str, list[Floats]] = {key: [] for key in ("step", *MEASURED)}
    for rows in scan(RunDirectory(run).metrics, MEASURED):
        of_step = np.isfinite(rows.values["loss"])
        kept = of_step | np.isfinite(rows.values["val_loss"])
        parts["step"].append(rows.step[kept].astype(np.float64))
        for key, values in rows.values.items():
            parts[key].append(values[kept])
    # One at a time, for a long run's parts and columns together take twice the memory.
    columns = {key: np.concatenate([np.empty(0), *parts.pop(key)]) for key in list(parts)}

    def known(key: str) -> Floats:
        values = columns[key]
        return np.extract(np.isfinite(values), values)

    def latest(key: str) -> float | None:
        values = known(key)
        return float(values[-1]) if len(values) else None

    def middle(key: str) -> float | None:
        values = known(key)
        return float(np.median(values)) if len(values) else None

    tokens, peak = latest("tokens"), known("peak_memory_bytes")
    return Progress(
        step=int(latest("step") or 0),
        saved=max(saved, default=0),
        tokens=None if tokens is None else int(tokens),
        loss=latest("loss"),
        val_loss=latest("val_loss"),
        bits_per_byte=latest("bits_per_byte"),
        tokens_per_s=middle("tokens_per_s"),
        step_s=middle("step_s"),
        mfu=middle("mfu"),
        peak_memory_bytes=int(peak.max()) if len(peak) else None,
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
