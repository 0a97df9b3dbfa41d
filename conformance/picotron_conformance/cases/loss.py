"""Cases of loss."""

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
from picotron_core.ops.loss import IGNORE_INDEX

# What differs from N=7, E=16, V=40, two of the targets ignored, an upstream gradient that is not 1.
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-of-each": {"N": 1, "E": 1, "V": 1, "ignored": 0.0},
    "one-token": {"N": 1, "ignored": 0.0},
    "V1": {"V": 1},
    "V2": {"V": 2},
    "V127": {"V": 127},
    "V1000": {"V": 1000, "N": 5},
    "V8200": {"V": 8200, "N": 3, "E": 4},
    "N70-V1100": {"N": 70, "V": 1100, "E": 20},
    "N760": {"N": 760, "V": 20, "E": 6},
    "V4099": {"V": 4099, "N": 4, "E": 8},
    "E1": {"E": 1},
    "E63": {"E": 63},
    "E200": {"E": 200},
    "N33": {"N": 33},
    "N130": {"N": 130, "V": 70},
    "N300": {"N": 300, "V": 24, "E": 8},
    "nothing-ignored": {"ignored": 0.0},
    "all-ignored": {"ignored": 1.0},
    "most-ignored": {"ignored": 0.9, "N": 40},
    "first-ignored": {"ignored": "first"},
    "last-ignored": {"ignored": "last"},
    "ends-of-vocabulary": {"targets": "ends"},
    "same-target": {"targets": "same", "N": 20},
    "ignore-0": {"ignore_index": 0},  # a token of the vocabulary that counts for nothing
    "ignore-last": {"ignore_index": 39},
    "ignore--1": {"ignore_index": -1},
    "no-tokens": {"N": 0},
    "sharp": {"gain": 5.0},
    "certain": {"gain": 30.0},
    "flat": {"gain": 1e-3},
    "zeros": {"values": "zeros"},
    "shifted": {"values": "shifted"},
    "outliers": {"values": "outliers"},
    "low-rank": {"values": "low_rank", "N": 24},
    "high-logits": {"values": "high"},
    "low-logits": {"values": "low"},
    "upstream-1": {"upstream": 1.0},
    "upstream-small": {"upstream": 2.0**-9},
    "upstream-large": {"upstream": 1000.0},  # a loss scale
    "upstream-huge": {"upstream": 1e7},
    "upstream-negative": {"upstream": -3.0},
    "upstream-zero": {"upstream": 0.0},
    "layout-offset": {"layout": "offset"},
    "layout-transposed": {"layout": "transposed"},
    "layout-sliced": {"layout": "sliced"},
    "layout-strided": {"layout": "strided"},
    "layout-broadcast": {"layout": "broadcast"},
    "layout-packed": {"layouts": {"hidden": PACKED, "weight": PACKED}},
    "layout-far": {"layouts": {"weight": FAR}},
    "layout-far-hidden": {"layouts": {"hidden": FAR}, "N": 2, "ignored": 0.0},
    "layout-targets-strided": {"layouts": {"targets": "strided"}},
    "layout-targets-broadcast": {
        "layouts": {"targets": "scalar"},
        "targets": "same",
        "ignored": 0.0,
    },
    "layout-weight-transposed": {"layouts": {"weight": "transposed"}},
    "layout-hidden-strided": {"layouts": {"hidden": "strided"}},
}
FULL: dict[str, dict[str, Any]] = {
    "V50257": {"V": 50257, "N": 9, "E": 8},
    "N128-E512-V2000": {"N": 128, "E": 512, "V": 2000},
    "V200064": {"V": 200064, "N": 2, "E": 4},
    "V128256": {"V": 128256, "N": 3, "E": 4},
    "N1025": {"N": 1025, "V": 33, "E": 8},
    "N600-V600": {"N": 600, "V": 600, "E": 32},
    "E1024": {"E": 1024, "N": 5},
}


def cases(dtype: str, profile: Profile, seed: int) -> Iterator[Case]:
    for name, options in (QUICK if profile == "quick" else QUICK | FULL).items():
        if dtype != "float16" or options.get("upstream", 1.0) < 1e4:
            yield case(name, dtype, **options)
    for number, random in enumerate(drawn("loss", dtype, profile, seed)):
        yield case(f"drawn-{number}", dtype, **_drawn(random))


def case(
    name: str,
    dtype: str,
    *,
    N: int = 7,
    E: int = 16,
    V: int = 40,
    ignored: float | str = 0.3,
    targets: str = "any",
    ignore_index: int = IGNORE_INDEX,
    values: str = "normal",
    gain: float = 1.0,
    upstream: float = 0.37,
    layout: str = "contiguous",
    layouts: dict[str, str] | None = None,
) -> Case:
    """ignored: the share of ignored targets, or "first" or "last". gain: a factor on the logits."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        hidden, weight = _values(values, N, E, V, generator)
        labels = _targets(targets, N, V, generator)
        return {
            "hidden": hidden * gain,
            "weight": weight,
            "targets": _ignore(labels, ignored, ignore_index, generator),
        }

    return Case(
        op="loss",
        name=name,
        dtype=dtype,
        draw=draw,
        options={"ignore_index": ignore_index},
        sizes={"N": N, "E": E, "V": V},
        layouts={"": layout, "targets": "contiguous", **(layouts or {})},
        outputs={"loss": ()},
        upstream=("loss",),
        upstream_scale=0.0,  # a single number, so it is given and not drawn
        upstream_shift=upstream,
    )


def _values(kind: str, N: int, E: int, V: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """hidden and weight whose logits are of the order of one; "high" and "low" are near +-1000."""
    distribution = DISTRIBUTIONS[kind if kind in DISTRIBUTIONS else "normal"]
    hidden = distribution((N, E), generator)
    weight = DISTRIBUTIONS["normal"]((V, E), generator) / E**0.5
    if kind in ("high", "low"):
        hidden[:, 0] = 32.0
        weight[:, 0] = 32.0 if kind == "high" else -32.0
    return hidden, weight


def _targets(kind: str, N: int, V: int, generator: Generator) -> Tensor:
    if kind == "ends":
        return torch.tensor([0, V - 1])[torch.arange(N) % 2]
    if kind == "same":
        return torch.full((N,), V // 2)
    return torch.randint(0, V, (N,), generator=generator)


def _ignore(labels: Tensor, share: float | str, index: int, generator: Generator) -> Tensor:
    out = torch.zeros(len(labels), dtype=torch.bool)
    if isinstance(share, str):
        out[{"first": slice(0, 1), "last": slice(-1, None)}[share]] = True
    else:
        out = torch.rand(len(labels), generator=generator) < share
    return labels.masked_fill(out, index)


def _drawn(random: Random) -> dict[str, Any]:
    return {
        "N": random.randint(1, 70),
        "E": random.randint(1, 70),
        "V": random.choice([2, 17, 64, 100, random.randint(1, 500)]),
        "ignored": random.choice([0.0, 0.2, 0.6]),
        "values": random.choice(["normal", "shifted", "outliers", "low_rank"]),
        "gain": random.choice([0.1, 1.0, 3.0]),
        "upstream": random.choice([1.0, 0.1, 7.0]),
        "layout": random.choice([kind for kind in LAYOUTS if kind != "scalar"]),
    }
