"""Save a state: written beside, made durable, then renamed into place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from picotron_core.checkpoint.manifest import write_manifest
from picotron_core.engine.state import TrainState
from picotron_core.errors import RunError
from picotron_core.files import fsync

TEMPORARY = ".writing-"  # a folder so named is never read, and swept by the next save


def save(
    state: TrainState,
    checkpoints: Path,
    *,
    facts: Mapping[str, Any],
    keep: int,
    writes: bool = True,
) -> Path:
    """Write `checkpoints/step-<n>/`; of the others keep the newest `keep` - 1 before it.

    The float32 masters go to model.safetensors under Hugging Face's names, the moments to
    optimizer.safetensors; the low-precision weights are derived and not kept. Checkpoints of later
    steps go: they belong to a future that resuming from an earlier one has given up.

    Args:
        facts: what the run must find again besides tensors (JSON), e.g. selections and data key.
        writes: one rank does. The others call this as well, for each may hold a part of the state.

    Raises: RunError where the disk refuses; the earlier checkpoints are then untouched.
    """
    final = checkpoints / f"step-{state.step:08d}"
    temporary = checkpoints / f"{TEMPORARY}{final.name}"
    kept: dict[str, dict[str, Tensor]] = {}
    for kind, name, whole in state.tensors():
        if writes:
            kept.setdefault(kind, {})[name] = whole.cpu()
    if not writes:
        return final
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        _write(state, kept, temporary, facts)
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


def _write(
    state: TrainState,
    kept: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    facts: Mapping[str, Any],
) -> None:
    masters = {name: whole.contiguous() for name, whole in kept[""].items()}
    save_file(masters, folder / "model.safetensors", metadata={"format": "pt"})
    moments = {
        f"{moment}.{name}": whole.contiguous()
        for moment in state.moments
        for name, whole in kept[moment].items()
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
