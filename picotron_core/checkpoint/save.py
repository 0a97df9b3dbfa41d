"""Save a state: written beside, made durable, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from picotron_core.checkpoint.manifest import FORMAT, MANIFEST, describe_files
from picotron_core.engine.state import TrainState
from picotron_core.errors import RunError

TEMPORARY = ".writing-"  # a folder so named is never read, and swept by the next save


def save(state: TrainState, checkpoints: Path, *, facts: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoints/step-<n>/` and remove all but the newest `keep`.

    The float32 masters go to model.safetensors under Hugging Face's names, the moments to
    optimizer.safetensors; the low-precision weights are derived and not kept.

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
        tensors = {name: master.detach() for name, master in state.masters.items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        moments = {
            f"{moment}.{name}": tensor
            for moment, by_name in state.moments.items()
            for name, tensor in by_name.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "tokens": state.tokens,
            **facts,
            "files": describe_files(temporary),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if final.exists():  # an earlier run of the same steps; the same state by construction
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(checkpoints)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"Cannot write the checkpoint {final}: {error}. "
            "Free space or give another --run.dir; earlier checkpoints are untouched."
        ) from None
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _sync(path: Path) -> None:
    """Have the disk hold it before anything that relies on it is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
