"""Cases of the optimizer: lists of parameters and the gradients of some updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from random import Random
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from picotron_conformance.cases.draws import drawn
from picotron_conformance.check import Profile
from picotron_core.ops.optimizer import AdamW

# A large step and decay, so that where each enters can be told from the update.
PLAIN = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.5)
SHAPES = ((7, 5), (1,), (), (0,), (33, 17), (1025,), (3, 2, 4))
FEW = ((33, 5), (7,))  # where the shapes are not the question

# How lists go from one update to the next. new: other list objects, other gradients' memory. kept:
# all objects and all memory are the same, as in a training loop that fills its gradients in place,
# and as a captured graph needs them. moved: the same list objects, but their tensors are others,
# or have other memory. tuples: read-only lists, and a read-only mapping in another order.
ListsFrom = Literal["new", "kept", "moved", "tuples"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Updates:
    """`steps` updates from number `first_step` on, or those of `numbers`.

    hypers: of each update in turn, where they change; else all have `hyper`.
    state: whether the moments hold something before.
    layouts: by "param", "grad" and "state".
    """

    name: str
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    steps: int = 3
    first_step: int = 1
    numbers: tuple[int, ...] = ()
    hyper: AdamW = PLAIN
    hypers: tuple[AdamW, ...] = ()
    grads: str = "normal"
    params: float = 1.0
    state: bool = False
    layouts: Mapping[str, str] = field(default_factory=dict)
    lists: ListsFrom = "new"

    @property
    def schedule(self) -> list[tuple[int, AdamW]]:
        """The number and the hyper-parameters of each update."""
        following = range(self.first_step, self.first_step + self.steps)
        return list(zip(self.numbers or following, cycle(self.hypers or (self.hyper,))))


def hyper(**changed: float) -> AdamW:
    plain = {n: getattr(PLAIN, n) for n in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    return AdamW(**{**plain, **changed})


def changing(*names: str) -> dict[str, Any]:
    """Four updates of the same lists; these hyper-parameters change from one to the next."""
    values = {
        "lr": (0.1, 0.3, 0.02, 0.1),
        "beta1": (0.9, 0.5, 0.95, 0.9),
        "beta2": (0.95, 0.8, 0.99, 0.95),
        "eps": (1e-3, 1e-1, 1.0, 1e-3),
        "weight_decay": (0.5, 2.0, 0.0, 0.5),
    }
    hypers = (hyper(**{name: values[name][update] for name in names}) for update in range(4))
    return {"shapes": FEW, "steps": 4, "hypers": tuple(hypers), "lists": "kept"}


def late(number: int, beta2: float, *, beta1: float = 0.9) -> dict[str, Any]:
    """Betas so near to 1 that the bias correction of that update can still be told from none."""
    settings = hyper(beta1=beta1, beta2=beta2, eps=1e-8)
    return {"shapes": FEW, "first_step": number, "state": True, "steps": 2, "hyper": settings}


QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-update": {"steps": 1},
    "two-updates": {"steps": 2},
    "ten-updates": {"steps": 10},
    "late": {"first_step": 1000, "state": True, "steps": 2},
    "late-101": late(101, 0.999),
    "late-101-slow": late(101, 0.999, beta1=0.99),
    "late-257": late(257, 0.999),
    "late-1000": late(1000, 0.9999),
    "late-4097": late(4097, 0.999),
    "late-4097-slow": late(4097, 0.9999, beta1=0.999),
    "late-32769": late(32769, 0.9999),
    "late-70000": late(70000, 0.9999),
    "late-70000-slow": late(70000, 0.99999, beta1=0.9999),
    "numbers-jump": {"shapes": FEW, "numbers": (7, 2, 2, 4000, 8), "lists": "kept"},
    "changing-lr": changing("lr"),
    "changing-beta1": changing("beta1"),
    "changing-beta2": changing("beta2"),
    "changing-eps": changing("eps"),
    "changing-decay": changing("weight_decay"),
    "changing-all": changing("lr", "beta1", "beta2", "eps", "weight_decay"),
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
    "grads-1e-17": {"shapes": FEW, "grads": "vanishing", "hyper": hyper(eps=1e-8)},
    "grads-1e7": {"shapes": FEW, "grads": "larger"},
    "grads-1e12": {"shapes": FEW, "grads": "enormous"},
    "grads-1e18": {"shapes": FEW, "grads": "largest"},  # their squares still are float32
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
    "flat": {"layouts": {"param": "flat", "grad": "flat", "state": "flat"}},
    "flat-params-and-grads": {"shapes": FEW, "layouts": {"param": "flat", "grad": "flat"}},
    "flat-params-alone": {"shapes": FEW, "layouts": {"param": "flat-reversed"}},
    "flat-grads-alone": {"shapes": FEW, "layouts": {"grad": "flat-reversed"}},
    "flat-states-alone": {"shapes": FEW, "layouts": {"state": "flat-reversed"}},
    "flat-kept": {
        "shapes": FEW,
        "layouts": {"param": "flat", "grad": "flat-reversed", "state": "flat"},
        "lists": "kept",
    },
    "kept-lists": {"shapes": FEW, "steps": 4, "lists": "kept"},
    "moved-tensors": {"shapes": FEW, "steps": 4, "lists": "moved"},
    "tuples": {"shapes": FEW, "lists": "tuples"},
    "hundred-updates": {"shapes": ((40,), (3, 5)), "steps": 100, "hyper": hyper(lr=1e-2)},
}
FULL: dict[str, dict[str, Any]] = {
    "thousand-updates": {"shapes": ((40,), (3, 5)), "steps": 1000, "hyper": hyper(lr=1e-3)},
    # Larger ones, and more of them, are in `checks.optimizer_lists.sizes`.
    "large-tensor": {"shapes": ((200003,), (5,)), "steps": 2},
    "many-small": {"shapes": tuple((i % 3 + 1,) for i in range(130)), "steps": 2},
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
    return normal * MAGNITUDES[kind]


MAGNITUDES = {
    "zeros": 0.0,
    "vanishing": 1e-17,
    "minute": 1e-12,
    "tiny": 1e-6,
    "normal": 1.0,
    "large": 1e4,
    "larger": 1e7,
    "enormous": 1e12,
    "largest": 1e18,
}


def _drawn(random: Random) -> dict[str, Any]:
    count = random.randint(1, 6)
    return {
        "shapes": tuple(
            tuple(random.randint(1, 40) for _ in range(random.randint(0, 3))) for _ in range(count)
        ),
        "steps": random.randint(1, 8),
        "first_step": random.choice([1, 1, 2, 10, 300, 5000, 100_000]),
        "state": random.choice([False, True]),
        "hypers": tuple(_drawn_hyper(random) for _ in range(random.randint(1, 3))),
        "grads": random.choice(["normal", "positive", "sparse", "tiny", "large", "enormous"]),
        "layouts": {part: random.choice(LAYOUTS) for part in ("param", "grad", "state")},
        "lists": random.choice(["new", "kept", "tuples"]),
    }


def _drawn_hyper(random: Random) -> AdamW:
    return AdamW(
        lr=random.choice([0.3, 1e-2, 1e-4]),
        beta1=random.choice([0.9, 0.8, 0.95]),
        beta2=random.choice([0.95, 0.99, 0.999, 0.9999]),
        eps=random.choice([1e-8, 1e-5, 1e-2]),
        weight_decay=random.choice([0.0, 0.1, 1.0]),
    )


LAYOUTS = ("contiguous", "offset", "transposed", "sliced", "strided", "flat", "flat-reversed")
