"""What mutants claim, where the claim is wrong or narrower than the kernel. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from picotron_core.registry import Code, Level, Reason, Request

Answer = Sequence[Reason]


def without(*features: str) -> Callable[[Request], Answer]:
    """Says no to requests with one of these features."""

    def supports(request: Request) -> Answer:
        return tuple(
            Reason(code=Code.FEATURE, detail=f"this kernel does not know {feature}")
            for feature in features
            if feature in request.features
        )

    return supports


def without_float16(request: Request) -> Answer:
    if request.dtype == "float16":
        return (Reason(code=Code.DTYPE, detail="this kernel does not know float16"),)
    return ()


def without_training(request: Request) -> Answer:
    if request.training:
        return (Reason(code=Code.TRAINING, detail="this kernel has no backward"),)
    return ()


def raises(request: Request) -> Answer:
    """A size that not every request names."""
    if request.sizes["head_dim"] > 256:
        return (Reason(code=Code.SHAPE, detail="D is at most 256"),)
    return ()


_turn = itertools.count()


def changes_its_mind(request: Request) -> Answer:
    """Serves every other time that it is asked."""
    if next(_turn) % 2:
        return (Reason(code=Code.FEATURE, detail="not this time"),)
    return ()


def gives_no_detail(request: Request) -> Answer:
    return (Reason(code=Code.DTYPE, detail=""),) if request.dtype == "float16" else ()


def answers_yes(request: Request) -> Any:
    """True, as of a function that is asked whether it may; the registry asks why not."""
    return True


def answers_with_text(request: Request) -> Any:
    return ("no float16",) if request.dtype == "float16" else ()


def imports_torch(request: Request) -> Answer:
    """Heavy: selection asks every backend, on machines that have none of its libraries."""
    import torch

    cuda = request.device.type == "cuda" and not torch.cuda.is_available()
    return (Reason(code=Code.DEVICE, detail="no CUDA device is here"),) if cuda else ()


def level_raises(request: Request) -> Level:
    return {"cuda": Level.ACCELERATED}[request.device.name]


def level_of_text(request: Request) -> Any:
    return "accelerated"
