"""A new model's weights: the same bits for every layout, whoever draws them and in what order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from picotron_core.model.llama import Llama

# A parameter's name -> its value, on any device, in any float dtype.
Values = Callable[[str], Tensor]


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


def drawn(model: Llama, seed: int) -> Values:
    """The first values of a whole model, which may be on the meta device; each is drawn when it is
    asked for.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    std = model.architecture.initializer_range
    return lambda name: initial_value(name, shapes[name], std=std, seed=seed)


@torch.no_grad()
def fill(model: Llama, values: Values) -> None:
    """Write every parameter in place, on its device and in its dtype; a tied head's once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values(name))


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace parameters, each under all the names that it has, by others of whatever shape, dtype
    and device.
    """
    new = {model.get_parameter(name): nn.Parameter(value) for name, value in values.items()}
    for module in model.modules():
        for leaf, held in list(module.named_parameters(recurse=False)):
            if held in new:
                module.register_parameter(leaf, new[held])


def initialise(model: Llama, seed: int) -> None:
    """Fill a whole model with its first values."""
    fill(model, drawn(model, seed))
