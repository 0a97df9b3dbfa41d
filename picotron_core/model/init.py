"""A new model's weights: the same bits for every layout, whoever draws them and in what order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from picotron_core.model.llama import Llama


def initial_value(name: str, shape: torch.Size, *, std: float, seed: int) -> Tensor:
    """The whole first value of the parameter of that (Hugging Face) name.

    Matrices and the embedding are normal(0, std), norms are one: as in transformers, without any
    scaling by depth. Each name seeds its own generator, so a rank that holds some layers, or a
    slice of a matrix, draws what one process would have drawn.

    Returns: `shape`, float32 on the CPU.
    """
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.normal(0.0, std, shape, generator=generator, device="cpu")


@torch.no_grad()
def initialise(model: Llama, seed: int) -> None:
    """Fill every parameter in place, on its device and in its dtype; a tied head is drawn once."""
    std = model.architecture.initializer_range
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, std=std, seed=seed))
