"""Save a state: written beside, made durable, then renamed into place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from picotron_core.checkpoint.manifest import write_manifest
from picotron_core.engine.state import TrainState
from picotron_core.errors import RunError
from picotron_core.files import fsync

TEMPORARY = ".writing-"  # a folder so named is never read, and swept by the next save


def save(state: TrainState, checkpoints: Path, *, facts: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoints/step-<n>/`; of the others keep the newest `keep` - 1 before it.

    The float32 masters go to model.safetensors under Hugging Face's names, the moments to
    optimizer.safetensors; the low-precision weights are derived and not kept. Checkpoints of later
    steps go: they belong to a future that resuming from an earlier one has given up.

    Args:
        facts: what the run must find again besides tensors (JSON), e.g. selections and data key.

    Raises: RunError where the disk refuses; the earlier checkpoints are then untouched.
    """
    final = checkpoints / f"step-{state.step:08d}"
    temporary = checkpoints / f"{TEMPORARY}{final.name}"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        _write(state, temporary, facts)
        if final.exists():  # renamed away, not deleted: a kill from here on loses neither
            final.rename(checkpoints / f"{TEMPORARY}replaced")
        temporary.rename(final)
        fsync(checkpoints)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"Cannot write the checkpoint {final}: {error}. "
            "Free space or give another --run.dir; earlier checkpoints are untouched."
        ) from None
    _prune(checkpoints, final, keep)
    return final


def _write(state: TrainState, folder: Path, facts: Mapping[str, Any]) -> None:
    masters = {name: master.detach() for name, master in state.masters.items()}
    save_file(masters, folder / "model.safetensors", metadata={"format": "pt"})
    moments = {
        f"{moment}.{name}": tensor
        for moment, by_name in state.moments.items()
        for name, tensor in by_name.items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    progress: dict[str, Any] = {"step": state.step, "tokens": state.tokens}
    if state.loss_scale:
        progress["loss_scale"] = asdict(state.loss_scale)
    write_manifest(folder, {**progress, **facts})
    for path in (*folder.iterdir(), folder):
        fsync(path)


def _prune(checkpoints: Path, newest: Path, keep: int) -> None:
    found = sorted(checkpoints.glob("step-*"))
    before = [path for path in found if path.name < newest.name]
    after = [path for path in found if path.name > newest.name]
    for old in (
        *before[: max(0, len(before) - (keep - 1))],
        *after,
        checkpoints / f"{TEMPORARY}replaced",
    ):
        shutil.rmtree(old, ignore_errors=True)
