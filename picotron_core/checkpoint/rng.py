"""The random generators' states, as text. Training draws nothing from them; a plugin may."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import torch
from torch import Tensor

from picotron_core.engine.state import TrainState


def rng_states(state: TrainState) -> dict[str, str]:
    """Of this rank's generators: torch's on the CPU, and that of its CUDA device."""
    found = {"rng.cpu": torch.get_rng_state()}
    if state.device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(state.device)
    return {name: _as_text(value) for name, value in found.items()}


def set_rng_states(state: TrainState, notes: Mapping[str, str]) -> None:
    """Raises: ValueError for what is no state of a generator."""
    try:
        if text := notes.get("rng.cpu"):
            torch.set_rng_state(_as_tensor(text))
        if (text := notes.get("rng.cuda")) and state.device.type == "cuda":
            torch.cuda.set_rng_state(_as_tensor(text), state.device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"no state of a random generator: {error}") from None


def _as_text(value: Tensor) -> str:
    return base64.b64encode(value.numpy().tobytes()).decode()


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
