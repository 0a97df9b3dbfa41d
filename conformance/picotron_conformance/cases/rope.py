"""Cases of rope."""

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

# What differs from B=2, H=4, K=2, T=9, D=16, positions 0..T-1 for all sequences.
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "D2": {"D": 2},
    "D6": {"D": 6},
    "D64": {"D": 64},
    "D80": {"D": 80},
    "D128": {"D": 128, "T": 5},
    "wide-long": {"D": 128, "T": 40, "B": 1},
    "many-heads-batches": {"B": 5, "H": 16, "K": 4, "T": 3},
    "one-token": {"T": 1, "B": 3, "start": 5},
    "one-token-batched": {"T": 1, "B": 3, "per_sequence": True},
    "one-head": {"H": 1, "K": 1},
    "mqa": {"H": 8, "K": 1},
    "mha": {"H": 3, "K": 3},
    "T-is-H": {"T": 4, "H": 4, "K": 4, "B": 4},
    "B-is-1": {"B": 1, "T": 33},
    "late": {"start": 131071},
    "position-0": {"T": 1},  # nothing turns, but the result is no view of its input
    "unordered": {"start": "any"},
    "per-sequence": {"per_sequence": True, "B": 3},
    "per-sequence-unordered": {"per_sequence": True, "start": "any"},
    "scaled-tables": {"factor": 1.3},  # YaRN scales cos and sin
    "free-tables": {"free": True},  # cos^2 + sin^2 is not 1: no kernel may use that it were
    "shifted": {"values": "shifted", "shift": 1.0},
    "outliers": {"values": "outliers"},
    "tiny": {"values": "tiny"},
    "large": {"values": "large", "T": 5},
    "layout-offset": {"layout": "offset"},
    "layout-transposed": {"layout": "transposed"},
    "layout-sliced": {"layout": "sliced"},
    "layout-fused": {"layout": "fused"},
    "layout-strided": {"layout": "strided"},
    "layout-broadcast": {"layout": "broadcast"},
    "large-upstream": {"upstream_scale": 1000.0},  # as under a loss scale
    "huge-upstream": {"upstream_scale": 1e7},
    "layout-packed": {"layouts": {"q": PACKED, "k": PACKED}},
    "layout-far": {"layouts": {"q": FAR}},
    "layout-far-k": {"layouts": {"k": FAR}},
    "upstream-far": {"upstream_layout": FAR},
    "layout-tables-strided": {"layouts": {"cos": "strided", "sin": "strided"}},
    "layout-tables-transposed": {"layouts": {"cos": "transposed", "sin": "sliced"}},
    "layout-tables-broadcast": {
        "layouts": {"cos": "broadcast", "sin": "broadcast"},
        "per_sequence": True,
    },
    "upstream-scalar": {"upstream_layout": "scalar"},
    "upstream-transposed": {"upstream_layout": "transposed"},
    "upstream-strided": {"upstream_layout": "strided"},
    "upstream-broadcast": {"upstream_layout": "broadcast"},
    "upstream-q": {"upstream": ("q_out",)},
    "upstream-k": {"upstream": ("k_out",)},
    "empty-batch": {"B": 0},
}
FULL: dict[str, dict[str, Any]] = {
    "D256": {"D": 256, "T": 3},
    "wide-130": {"D": 128, "T": 130, "H": 8, "K": 2},
    "pairs-160": {"B": 10, "H": 16, "K": 4, "T": 5},
    "T-1025": {"T": 1025, "B": 1, "H": 2, "K": 1},
    "many-heads": {"H": 32, "K": 8, "T": 7},
    "D10": {"D": 10, "T": 130},
}


def cases(dtype: str, profile: Profile, seed: int) -> Iterator[Case]:
    for name, options in (QUICK if profile == "quick" else QUICK | FULL).items():
        if dtype != "float16" or options.get("upstream_scale", 1.0) < 1e4:
            yield case(name, dtype, **options)
    for number, random in enumerate(drawn("rope", dtype, profile, seed)):
        yield case(f"drawn-{number}", dtype, **_drawn(random))


def case(
    name: str,
    dtype: str,
    *,
    B: int = 2,
    H: int = 4,
    K: int = 2,
    T: int = 9,
    D: int = 16,
    start: int | str = 0,
    per_sequence: bool = False,
    factor: float = 1.0,
    free: bool = False,
    values: str = "normal",
    layout: str = "contiguous",
    layouts: dict[str, str] | None = None,
    upstream: tuple[str, ...] = ("q_out", "k_out"),
    upstream_layout: str = "contiguous",
    upstream_scale: float = 1.0,
    shift: float = 0.0,
) -> Case:
    """start: the first position, or "any" for positions in no order. factor: on the tables."""
    rows = (B, T) if per_sequence else (T,)

    def draw(generator: Generator) -> dict[str, Tensor]:
        q = DISTRIBUTIONS[values]((B, H, T, D), generator)
        k = DISTRIBUTIONS[values]((B, K, T, D), generator)
        cos, sin = _tables(rows, D, start, generator)
        if free:
            sin = sin * 0.5 + 0.25
        return {"q": q, "k": k, "cos": cos * factor, "sin": sin * factor}

    return Case(
        op="rope",
        name=name,
        dtype=dtype,
        draw=draw,
        sizes={"B": B, "H": H, "K": K, "T": T, "D": D},
        layouts={"": layout, "cos": "contiguous", "sin": "contiguous", **(layouts or {})},
        outputs={"q_out": (B, H, T, D), "k_out": (B, K, T, D)},
        upstream=upstream,
        upstream_layout=upstream_layout,
        upstream_scale=upstream_scale,
        upstream_shift=shift,
        kind="per-sequence" if per_sequence else "",
    )


def _tables(
    rows: tuple[int, ...], D: int, start: int | str, generator: Generator
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * 10000^(-2i/D), (*rows, D/2)."""
    if start == "any" or len(rows) == 2:
        position = torch.randint(0, 5000, rows, generator=generator).double()
    else:
        assert isinstance(start, int)
        position = torch.arange(start, start + rows[0], dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = position[..., None] * frequency
    return angle.cos(), angle.sin()


def _drawn(random: Random) -> dict[str, Any]:
    K = random.choice([1, 2, 3])
    return {
        "B": random.choice([1, 2, 3]),
        "H": K * random.choice([1, 2, 4]),
        "K": K,
        "T": random.randint(1, 40),
        "D": 2 * random.randint(1, 40),
        "start": random.choice([0, 3, 4095, "any"]),
        "per_sequence": random.random() < 0.4,
        "values": random.choice(["normal", "shifted", "outliers", "tiny", "low_rank"]),
        "layout": random.choice([kind for kind in LAYOUTS if kind != "scalar"]),
        "upstream_layout": random.choice(LAYOUTS),
    }
