"""Find a run's newest whole checkpoint and read it back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from picotron_core.checkpoint.manifest import MANIFEST, read_manifest
from picotron_core.engine.state import TrainState
from picotron_core.errors import ConfigError, DamagedFileError

log = logging.getLogger("picotron")


def find_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run, or the one given itself, with its manifest.

    A damaged one is named in a warning and passed over for the one before.

    Raises: ConfigError where there is none; DamagedFileError where all are damaged.
    """
    if (run / MANIFEST).is_file():
        return run, read_manifest(run)
    found = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    if not found:
        raise ConfigError(
            f"{run} holds no checkpoint. Give the folder of a run that has saved one, "
            "e.g. runs/demo."
        )
    damage = ""
    for folder in found:
        try:
            return folder, read_manifest(folder)
        except DamagedFileError as error:
            log.warning("%s The one before it is used.", error)
            damage = str(error)
    raise DamagedFileError(f"No checkpoint of {run} is whole. {damage}")


def load(state: TrainState, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Fill `state` from a checkpoint that `find_checkpoint` returned.

    Raises: DamagedFileError where its tensors are not those of the model.
    """
    _fill_parts(state, state.masters, load_file(folder / "model.safetensors"), folder)
    moments = load_file(folder / "optimizer.safetensors")
    for moment, by_name in state.moments.items():
        prefix = f"{moment}."
        mine = {n.removeprefix(prefix): t for n, t in moments.items() if n.startswith(prefix)}
        _fill_parts(state, by_name, mine, folder)
    state.step, state.tokens = int(manifest["step"]), int(manifest["tokens"])
    if state.loss_scale and "loss_scale" in manifest:
        seen = {name: manifest["loss_scale"][name] for name in ("value", "steps", "skips")}
        state.loss_scale = replace(state.loss_scale, **seen)
    state.weights.publish()


def load_weights_only(state_dict: Mapping[str, Tensor], folder: Path) -> None:
    """Fill a model's parameters from a checkpoint, for generation."""
    sources = load_file(folder / "model.safetensors")
    _refuse_other_models({n: t.shape for n, t in state_dict.items()}, sources, folder)
    for name, target in state_dict.items():
        target.data.copy_(sources[name])


def _fill_parts(
    state: TrainState, targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], folder: Path
) -> None:
    """Fill what this rank holds."""
    _refuse_other_models(state.layout.shapes, sources, folder)
    for name, _ in state.model.named_parameters():
        part = state.weights.part(name, state.layout.part(name, sources[name]))
        if part is not None:
            targets[name].data.copy_(part)


def _refuse_other_models(
    mine: Mapping[str, torch.Size], sources: Mapping[str, Tensor], folder: Path
) -> None:
    if mine.keys() != sources.keys():
        odd = sorted(mine.keys() ^ sources.keys())[0]
        raise DamagedFileError(
            f"{folder} is of another model: {odd!r} is in only one of the two. "
            "Resume with the model settings of the run's own config.toml."
        )
    for name, shape in mine.items():
        if shape != sources[name].shape:
            raise DamagedFileError(
                f"{folder} is of another model: {name} is {tuple(sources[name].shape)} there, "
                f"{tuple(shape)} here."
            )
