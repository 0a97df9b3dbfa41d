"""Cases of the optimizer: lists of parameters and the gradients of some updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Generator, Tensor

from picotron_conformance.cases.draws import drawn
from picotron_conformance.check import Profile
from picotron_core.ops.optimizer import AdamW

# A large step and decay, so that where each enters can be told from the update.
PLAIN = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.5)
SHAPES = ((7, 5), (1,), (), (0,), (33, 17), (1025,), (3, 2, 4))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Updates:
    """`steps` updates from number `first_step` on. state: what the moments hold before.

    layouts: by "param", "grad" and "state".
    """

    name: str
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    steps: int = 3
    first_step: int = 1
    hyper: AdamW = PLAIN
    grads: str = "normal"
    params: float = 1.0
    state: bool = False
    layouts: Mapping[str, str] = field(default_factory=dict)


def hyper(**changed: float) -> AdamW:
    plain = {n: getattr(PLAIN, n) for n in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    return AdamW(**{**plain, **changed})


QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-update": {"steps": 1},
    "two-updates": {"steps": 2},
    "ten-updates": {"steps": 10},
    "late": {"first_step": 1000, "state": True, "steps": 2},
    "second-of-a-run": {"first_step": 2, "state": True, "steps": 1},
    "lr-0": {"hyper": hyper(lr=0.0)},
    "lr-1e-3": {"hyper": hyper(lr=1e-3)},
    "lr-3e-5": {"hyper": hyper(lr=3e-5, weight_decay=0.1)},
    "no-decay": {"hyper": hyper(weight_decay=0.0)},
    "strong-decay": {"hyper": hyper(weight_decay=5.0)},
    "large-parameters": {"params": 100.0},
    "beta1-0": {"hyper": hyper(beta1=0.0)},
    "beta2-0.999": {"hyper": hyper(beta2=0.999, eps=1e-8), "steps": 5},
    "beta2-below-beta1": {"hyper": hyper(beta1=0.95, beta2=0.6)},
    "eps-1e-8": {"hyper": hyper(eps=1e-8)},
    "eps-large": {"hyper": hyper(eps=1.0)},
    "grads-tiny": {"grads": "tiny", "hyper": hyper(eps=1e-8)},  # of the order of eps
    "grads-1e-12": {"grads": "minute", "hyper": hyper(eps=1e-8)},
    "grads-large": {"grads": "large"},
    "grads-zero": {"grads": "zeros"},
    "grads-zero-late": {"grads": "zeros", "state": True, "first_step": 50},
    "grads-of-one-sign": {"grads": "positive", "steps": 6},
    "grads-sparse": {"grads": "sparse", "steps": 5},
    "one-tensor": {"shapes": ((130,),)},
    "many-tensors": {"shapes": tuple((i % 7 + 1, i % 5 + 1) for i in range(60))},
    "empty-tensors": {"shapes": ((0,), (0, 3), (4,))},
    "no-tensors": {"shapes": ()},
    "layout-param": {"layouts": {"param": "transposed"}},
    "layout-grad": {"layouts": {"grad": "transposed"}},
    "layout-state": {"layouts": {"state": "transposed"}},
    "layout-all": {"layouts": {"param": "strided", "grad": "sliced", "state": "offset"}},
    "layout-grad-broadcast": {"layouts": {"grad": "broadcast"}},
    "hundred-updates": {"shapes": ((40,), (3, 5)), "steps": 100, "hyper": hyper(lr=1e-2)},
}
FULL: dict[str, dict[str, Any]] = {
    "thousand-updates": {"shapes": ((40,), (3, 5)), "steps": 1000, "hyper": hyper(lr=1e-3)},
    "large-tensor": {"shapes": ((1000003,), (5,)), "steps": 2},
    "many-small": {"shapes": tuple((i % 3 + 1,) for i in range(400)), "steps": 2},
}


@lru_cache(maxsize=64)
def cases(profile: Profile, seed: int) -> tuple[Updates, ...]:
    """Made once: golden results are kept by case."""
    return tuple(_cases(profile, seed))


def _cases(profile: Profile, seed: int) -> Iterator[Updates]:
    for name, options in (QUICK if profile == "quick" else QUICK | FULL).items():
        yield Updates(name=name, **options)
    for number, random in enumerate(drawn("optimizer", "", profile, seed)):
        yield Updates(name=f"drawn-{number}", **_drawn(random))


def gradients(kind: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "sparse":  # as of an embedding: most rows get none
        return normal * (torch.rand(shape, generator=generator) < 0.3)
    if kind == "positive":
        return normal.abs() + 0.1
    return normal * {"normal": 1.0, "tiny": 1e-6, "minute": 1e-12, "large": 1e4, "zeros": 0.0}[kind]


def _drawn(random: Random) -> dict[str, Any]:
    count = random.randint(1, 6)
    return {
        "shapes": tuple(
            tuple(random.randint(1, 40) for _ in range(random.randint(0, 3))) for _ in range(count)
        ),
        "steps": random.randint(1, 8),
        "hyper": AdamW(
            lr=random.choice([0.3, 1e-2, 1e-4]),
            beta1=random.choice([0.9, 0.8, 0.95]),
            beta2=random.choice([0.95, 0.99, 0.999]),
            eps=random.choice([1e-8, 1e-5, 1e-2]),
            weight_decay=random.choice([0.0, 0.1, 1.0]),
        ),
        "grads": random.choice(["normal", "positive", "sparse", "tiny", "large"]),
        "layouts": {part: random.choice(LAYOUTS) for part in ("param", "grad", "state")},
    }


LAYOUTS = ("contiguous", "offset", "transposed", "sliced", "strided")
