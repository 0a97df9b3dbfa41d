"""Cases of swiglu."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Generator, Tensor

from picotron_conformance.cases.draws import drawn
from picotron_conformance.check import Profile
from picotron_conformance.inputs import DISTRIBUTIONS, FAR, LAYOUTS, PACKED
from picotron_conformance.problem import Case

# What differs from (2, 5, 48), normal values, contiguous.
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-element": {"shape": (1,)},
    "flat": {"shape": (37,)},
    "odd": {"shape": (3, 7)},
    "F129": {"shape": (2, 3, 129)},
    "F1025": {"shape": (2, 1025)},
    "F4099": {"shape": (3, 4099)},
    "four-dims": {"shape": (2, 3, 4, 10)},
    "rows-300": {"shape": (300, 9)},
    "rows-40": {"shape": (40, 2601)},
    "empty": {"shape": (0, 8)},
    "saturated": {"gate": "saturated"},  # +-20, +-100: silu is 0 or the gate
    "far-below": {"gate": "far_below"},  # exp(-gate) leaves float16, silu does not yet
    "signed-zeros": {"gate": "signed_zeros"},
    "turning-point": {"gate": "turning"},  # silu' = 0 near -1.278
    "zero-up": {"up": "zeros"},
    "shifted": {"gate": "shifted", "up": "shifted", "shift": 1.0},
    "outliers": {"gate": "outliers", "up": "outliers"},
    "tiny": {"gate": "tiny", "up": "tiny"},
    "tiny-gate": {"gate": "tiny"},
    "large-up": {"up": "large", "shape": (2, 33)},
    "larger-up": {"gate": "tiny", "up": "large", "gain": 12.0},  # up to 24 000
    "low-rank": {"gate": "low_rank", "up": "low_rank"},
    "small-upstream": {"upstream_scale": 1e-3},
    "large-upstream": {"upstream_scale": 1000.0},  # as under a loss scale
    "huge-upstream": {"upstream_scale": 1e7},
    "layout-offset": {"layout": "offset"},
    "layout-transposed": {"layout": "transposed"},
    "layout-sliced": {"layout": "sliced"},
    "layout-strided": {"layout": "strided"},
    "layout-broadcast": {"layout": "broadcast"},
    "layout-packed": {"layout": PACKED},
    "layout-far": {"layouts": {"gate": FAR}},
    "layout-far-up": {"layouts": {"up": FAR}},
    "upstream-far": {"upstream_layout": FAR},
    "layout-gate-transposed": {"layouts": {"gate": "transposed"}},
    "layout-up-strided": {"layouts": {"up": "strided"}},
    "layout-up-broadcast": {"layouts": {"up": "broadcast"}},
    "upstream-scalar": {"upstream_layout": "scalar"},
    "upstream-broadcast": {"upstream_layout": "broadcast"},
    "upstream-transposed": {"upstream_layout": "transposed"},
    "upstream-strided": {"upstream_layout": "strided"},
    "upstream-sliced": {"upstream_layout": "sliced"},
}
FULL: dict[str, dict[str, Any]] = {
    "F11008": {"shape": (3, 11008)},
    "F65537": {"shape": (1, 65537)},
    "rows-5000": {"shape": (5000, 3)},
    "elements-2M": {"shape": (64, 33000)},
}


def cases(dtype: str, profile: Profile, seed: int) -> Iterator[Case]:
    for name, options in (QUICK if profile == "quick" else QUICK | FULL).items():
        if dtype != "float16" or options.get("upstream_scale", 1.0) < 1e4:
            yield case(name, dtype, **options)
    for number, random in enumerate(drawn("swiglu", dtype, profile, seed)):
        yield case(f"drawn-{number}", dtype, **_drawn(random))


def case(
    name: str,
    dtype: str,
    *,
    shape: tuple[int, ...] = (2, 5, 48),
    gate: str = "normal",
    up: str = "normal",
    gain: float = 1.0,
    layout: str = "contiguous",
    layouts: dict[str, str] | None = None,
    upstream_layout: str = "contiguous",
    upstream_scale: float = 1.0,
    shift: float = 0.0,
) -> Case:
    """gain: a factor on up."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        drawn_gate = _gate(gate, shape, generator)
        return {"gate": drawn_gate, "up": gain * DISTRIBUTIONS[up](shape, generator)}

    rows = 1
    for size in shape[:-1]:
        rows *= size
    return Case(
        op="swiglu",
        name=name,
        dtype=dtype,
        draw=draw,
        sizes={"N": rows, "F": shape[-1]},
        layouts={"": layout, **(layouts or {})},
        outputs={"y": shape},
        upstream=("y",),
        upstream_layout=upstream_layout,
        upstream_scale=upstream_scale,
        upstream_shift=shift,
    )


def _gate(kind: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    if kind in DISTRIBUTIONS:
        return DISTRIBUTIONS[kind](shape, generator)
    choices = {
        "saturated": [20.0, -20.0, 100.0, -100.0, 12.0, -12.0, -15.0],
        "far_below": [-11.5, -12.0, -13.0],
        "signed_zeros": [0.0, -0.0, 1.0],
        "turning": [-1.2784645, -1.25, -1.3, -1.0],
    }[kind]
    picked = torch.randint(0, len(choices), shape, generator=generator)
    return torch.tensor(choices, dtype=torch.float64)[picked]


def _drawn(random: Random) -> dict[str, Any]:
    rows = random.choice([(random.randint(1, 60),), (2, random.randint(1, 20)), (2, 3, 2), ()])
    kinds = ["normal", "shifted", "outliers", "tiny", "low_rank"]
    return {
        "shape": (*rows, random.randint(1, 300)),
        "gate": random.choice([*kinds, "saturated"]),
        "up": random.choice(kinds),
        "layout": random.choice([kind for kind in LAYOUTS if kind != "scalar"]),
        "upstream_layout": random.choice(LAYOUTS),
        "shift": random.choice([0.0, 1.0]),
    }
