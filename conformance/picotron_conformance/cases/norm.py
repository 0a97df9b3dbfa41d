"""Cases of norm."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from torch import Generator, Tensor

from picotron_conformance.cases.draws import drawn
from picotron_conformance.check import Profile
from picotron_conformance.inputs import DISTRIBUTIONS, FAR, LAYOUTS, PACKED
from picotron_conformance.problem import Case

# What differs from x (2, 5, 64), eps 1e-5, normal values, a signed weight, contiguous.
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-element": {"shape": (1, 1)},
    "one-row": {"shape": (33,)},
    "one-column": {"shape": (5, 1)},
    "odd": {"shape": (3, 7)},
    "E123": {"shape": (4, 123)},
    "E1000": {"shape": (4, 1000)},
    "E4096": {"shape": (3, 4096)},
    "row-4097": {"shape": (1, 4097)},  # one row: an error of its root is a factor on the whole
    "row-6000": {"shape": (1, 6000)},
    "row-8192": {"shape": (1, 8192)},
    "wide-rows": {"shape": (20, 1030)},
    "many-rows": {"shape": (257, 24)},
    "many-rows-shifted": {"shape": (300, 17), "values": "shifted", "shift": 1.0},
    "four-dims": {"shape": (2, 3, 4, 20)},
    "no-rows": {"shape": (0, 8)},
    "no-rows-3d": {"shape": (2, 0, 8)},
    "eps-large": {"eps": 0.5},
    "eps-1e-6": {"eps": 1e-6, "values": "tiny"},  # x^2 is of the order of eps
    "eps-1e-8": {"eps": 1e-8, "values": "tiny"},
    "eps-small": {"eps": 1e-12},
    "eps-0": {"eps": 0.0},
    "zeros": {"values": "zeros"},
    "shifted": {"values": "shifted", "shift": 1.0},
    "outliers": {"values": "outliers"},
    "low-rank": {"values": "low_rank"},
    "large": {"values": "large"},
    "near-max": {"values": "large", "gain": 12.0},  # up to 24 000: float16 ends at 65 504
    "constant": {"values": "constant"},
    "small-upstream": {"upstream_scale": 1e-3},
    "large-upstream": {"upstream_scale": 1000.0},  # as under a loss scale
    "huge-upstream": {"upstream_scale": 1e7},
    "layout-offset": {"layout": "offset"},
    "layout-transposed": {"layout": "transposed"},
    "layout-sliced": {"layout": "sliced"},
    "layout-strided": {"layout": "strided"},
    "layout-broadcast": {"layout": "broadcast"},
    "layout-packed": {"layouts": {"x": PACKED, "weight": PACKED}},
    "layout-far": {"layouts": {"x": FAR}},
    "upstream-far": {"upstream_layout": FAR},
    "layout-weight-strided": {"layouts": {"weight": "strided"}},
    "layout-weight-scalar": {"layouts": {"weight": "scalar"}},
    "layout-2d-transposed": {"shape": (6, 40), "layouts": {"x": "transposed"}},
    "upstream-scalar": {"upstream_layout": "scalar"},
    "upstream-broadcast": {"upstream_layout": "broadcast"},
    "upstream-transposed": {"upstream_layout": "transposed"},
    "upstream-strided": {"upstream_layout": "strided"},
    "upstream-sliced": {"upstream_layout": "sliced"},
}
FULL: dict[str, dict[str, Any]] = {
    "E2": {"shape": (3, 2)},
    "E1023": {"shape": (5, 1023)},
    "E1025": {"shape": (5, 1025)},
    "E8193": {"shape": (3, 8193)},
    "E16384": {"shape": (2, 16384)},
    "rows-5000": {"shape": (5000, 16)},
    "rows-70000": {"shape": (70000, 4)},
    "wide-rows-64": {"shape": (64, 4096)},
    "rows-1025": {"shape": (1025, 130), "values": "outliers"},
    "tiny-eps-1e-2": {"values": "tiny", "eps": 1e-2},
}


def cases(dtype: str, profile: Profile, seed: int) -> Iterator[Case]:
    for name, options in (QUICK if profile == "quick" else QUICK | FULL).items():
        if dtype != "float16" or options.get("upstream_scale", 1.0) < 1e4:
            yield case(name, dtype, **options)
    for number, random in enumerate(drawn("norm", dtype, profile, seed)):
        yield case(f"drawn-{number}", dtype, **_drawn(random))


def case(
    name: str,
    dtype: str,
    *,
    shape: tuple[int, ...] = (2, 5, 64),
    eps: float = 1e-5,
    values: str = "normal",
    gain: float = 1.0,
    layout: str = "contiguous",
    layouts: dict[str, str] | None = None,
    upstream_layout: str = "contiguous",
    upstream_scale: float = 1.0,
    shift: float = 0.0,
) -> Case:
    """gain: a factor on the values. shift: a mean of the upstream gradient."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        x = gain * DISTRIBUTIONS[values](shape, generator)
        return {"x": x, "weight": DISTRIBUTIONS["normal"](shape[-1:], generator)}

    rows = 1
    for size in shape[:-1]:
        rows *= size
    return Case(
        op="norm",
        name=name,
        dtype=dtype,
        draw=draw,
        options={"eps": eps},
        sizes={"N": rows, "E": shape[-1]},
        layouts={"": layout, "weight": "contiguous", **(layouts or {})},
        outputs={"y": shape},
        upstream=("y",),
        upstream_layout=upstream_layout,
        upstream_scale=upstream_scale,
        upstream_shift=shift,
    )


def _drawn(random: Random) -> dict[str, Any]:
    E = random.choice([1, 2, 8, 32, 48, 100, 256, random.randint(1, 700)])
    rows = random.choice([(random.randint(1, 90),), (2, random.randint(1, 30)), (2, 3, 4), ()])
    return {
        "shape": (*rows, E),
        "eps": random.choice([1e-6, 1e-5, 1e-3, 0.1]),
        "values": random.choice(["normal", "shifted", "outliers", "tiny", "large", "low_rank"]),
        "layout": random.choice([kind for kind in LAYOUTS if kind != "scalar"]),
        "upstream_layout": random.choice(LAYOUTS),
        "shift": random.choice([0.0, 1.0]),
    }
