"""Cases of attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import torch
from torch import Generator, Tensor

from picotron_conformance.cases.blocks import FULL_BLOCKS, QUICK_BLOCKS
from picotron_conformance.cases.draws import drawn
from picotron_conformance.check import Profile
from picotron_conformance.inputs import DISTRIBUTIONS, FAR, LAYOUTS, PACKED
from picotron_conformance.problem import Case

# What differs from B=2, H=4, K=2, T=S=17, D=16, causal, normal values, contiguous.
QUICK: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"causal": False},
    "mha": {"K": 4},
    "mha-full": {"K": 4, "causal": False},
    "mqa": {"H": 8, "K": 1, "S": 33},
    "gqa-16": {"H": 16, "K": 1, "values": "shifted"},
    "gqa-6-2": {"H": 6, "K": 2, "B": 3, "S": 21},
    "one-token": {"T": 1, "S": 1, "B": 3},
    "one-token-mha": {"T": 1, "S": 1, "K": 4},  # the output is v itself, but no view of it
    "decode": {"T": 1, "S": 37},
    "decode-window": {"T": 1, "S": 37, "window": 5},
    "decode-docs": {"T": 1, "S": 37, "docs": "packed"},
    "decode-full": {"T": 1, "S": 37, "causal": False},
    "chunk": {"T": 5, "S": 23},
    "fewer-keys": {"T": 23, "S": 5},  # rows that see nothing
    "fewer-keys-full": {"T": 23, "S": 5, "causal": False},
    "cross": {"T": 9, "S": 40, "causal": False},
    "one-key": {"T": 6, "S": 1, "causal": False},
    "D1": {"D": 1},
    "D7": {"D": 7},
    "D59": {"D": 59},
    "D80": {"D": 80, "S": 9},
    "D128": {"D": 128, "S": 9},
    "D256": {"D": 256, "S": 5, "H": 2, "K": 1},
    "tile-15": {"S": 15, "B": 1},
    "tile-16": {"S": 16, "B": 1},
    "tile-64": {"S": 64, "B": 1, "H": 2, "K": 1},
    "tile-65": {"S": 65, "B": 1, "H": 2, "K": 1},
    "tile-130": {"S": 130, "B": 1, "H": 2, "K": 1},
    "chunk-docs-window": {"T": 5, "S": 23, "docs": "packed", "window": 7},
    "window": {"window": 5},
    "window-1": {"window": 1},
    "window-all": {"window": 17},
    "window-more": {"window": 1000},
    "window-max": {"window": sys.maxsize},
    "window-chunk": {"T": 5, "S": 23, "window": 7},
    "window-tiles": {"S": 130, "window": 67, "B": 1, "H": 2, "K": 1},
    "docs": {"docs": "packed", "B": 3},
    "docs-full": {"docs": "packed", "causal": False},
    "docs-mixed": {"docs": "mixed"},
    "docs-chunk": {"docs": "packed", "T": 5, "S": 23},
    "docs-window": {"docs": "packed", "window": 4, "S": 33},
    "docs-int32": {"docs": "int32"},
    "docs-many": {"docs": "packed", "B": 6, "S": 12},
    "docs-window-heads": {"docs": "packed", "window": 5, "H": 16, "K": 4, "B": 1},
    "docs-tiles": {"docs": "packed", "S": 130, "B": 2, "H": 2, "K": 1},
    "scale": {"scale": 0.3},
    "scale-0": {"scale": 0.0},
    "scale-1": {"scale": 1.0, "values": "tiny"},
    "scale-negative": {"scale": -0.5},
    "lse": {"lse": "lse"},
    "lse-full": {"lse": "lse", "causal": False},
    "lse-mha": {"lse": "lse", "K": 4},
    "lse-mqa": {"lse": "lse", "H": 8, "K": 1},
    "lse-chunk": {"lse": "lse", "T": 5, "S": 23},
    "lse-decode": {"lse": "lse", "T": 1, "S": 37},
    "lse-window": {"lse": "lse", "window": 5},
    "lse-docs-full": {"lse": "lse", "docs": "packed", "causal": False},
    "lse-scale": {"lse": "lse", "scale": 0.3},
    "lse-fewer-keys": {"lse": "lse", "T": 9, "S": 4},
    "lse-backward": {"lse": "lse_backward"},
    "lse-backward-full": {"lse": "lse_backward", "causal": False},
    "lse-backward-mha": {"lse": "lse_backward", "K": 4, "S": 40},
    "lse-backward-mqa": {"lse": "lse_backward", "H": 8, "K": 1},
    "lse-backward-window": {"lse": "lse_backward", "window": 6, "S": 33},
    "lse-backward-fewer-keys": {"lse": "lse_backward", "T": 9, "S": 4},
    "lse-backward-docs": {"lse": "lse_backward", "docs": "packed"},
    "lse-alone": {"lse": "lse_backward", "upstream": ("lse",)},
    "shifted": {"values": "shifted", "shift": 1.0},
    "shifted-v": {"values": {"v": "shifted"}, "shift": 1.0, "S": 65, "B": 1},
    "outliers": {"values": "outliers", "D": 32},
    "tiny": {"values": "tiny"},
    "large-v": {"values": {"v": "large"}},
    "sharp": {"values": {"q": "sharp", "k": "sharp"}, "S": 40},
    "low-rank": {"values": "low_rank", "D": 32, "S": 40},
    "ramp-up": {"values": {"k": "ramp_up", "q": "ones"}, "S": 140, "B": 1, "H": 2, "K": 1},
    "ramp-down": {"values": {"k": "ramp_down", "q": "ones"}, "S": 140, "B": 1, "H": 2, "K": 1},
    "small-upstream": {"upstream_scale": 1e-3},
    "large-upstream": {"upstream_scale": 1000.0},  # as under a loss scale
    "huge-upstream": {"upstream_scale": 1e7},
    "layout-offset": {"layout": "offset"},
    "layout-transposed": {"layout": "transposed"},
    "layout-sliced": {"layout": "sliced"},
    "layout-fused": {"layout": "fused"},
    "layout-strided": {"layout": "strided"},
    "layout-broadcast": {"layout": "broadcast"},
    "layout-packed": {"layout": PACKED},
    "layout-far": {"layouts": {"k": FAR}},
    "layout-far-q": {"layouts": {"q": FAR}},
    "layout-far-v": {"layouts": {"v": FAR}},
    "upstream-far": {"upstream_layout": FAR},
    "layout-k-transposed": {"layouts": {"k": "transposed"}},
    "layout-docs-strided": {"docs": "packed", "layouts": {"doc_ids": "strided"}},
    "upstream-scalar": {"upstream_layout": "scalar"},
    "upstream-broadcast": {"upstream_layout": "broadcast"},
    "upstream-transposed": {"upstream_layout": "transposed"},
    "upstream-strided": {"upstream_layout": "strided"},
    "upstream-lse-strided": {"lse": "lse_backward", "upstream_layout": "strided"},
    "empty-batch": {"B": 0},
    "empty-queries": {"T": 0, "S": 5, "causal": False},
    # Long or wide, and last: questions of state take the first case of each kind.
    "tile-300": {"S": 300, "B": 1, "H": 1, "K": 1, "D": 8},
    "chunk-tiles": {"T": 10, "S": 138, "B": 1, "H": 2, "K": 1},  # two whole tiles came before
    "tile-257-full": {"S": 257, "B": 1, "H": 1, "K": 1, "D": 8, "causal": False},
    "wide-docs": {"D": 128, "S": 70, "docs": "packed", "B": 1, "H": 2, "K": 1},
    "wide-window-chunk": {"D": 128, "T": 40, "S": 100, "window": 33, "B": 1, "H": 2, "K": 1},
    "fewer-keys-tiles": {"T": 100, "S": 20, "B": 1, "H": 2, "K": 1},  # tiles that see nothing
    "lse-decode-long": {"lse": "lse", "T": 1, "S": 300, "B": 1},
    "lse-tiles": {"lse": "lse", "S": 130, "B": 1, "H": 2, "K": 1},
    "chunk-docs-window-tiles": {
        **{"T": 60, "S": 124, "docs": "packed", "window": 20},
        **{"B": 1, "H": 2, "K": 1},
    },
}
FULL: dict[str, dict[str, Any]] = {
    "D32": {"D": 32},
    "D64": {"D": 64, "S": 97},
    "D96": {"D": 96, "S": 33},
    "D257": {"D": 257, "S": 5},
    "tile-63": {"S": 63, "B": 1},
    "tile-97": {"S": 97, "B": 1},
    "tile-128": {"S": 128, "B": 1},
    "tile-129": {"S": 129, "B": 1},
    "tile-256": {"S": 256, "B": 1, "H": 2, "K": 1},
    "tile-513": {"S": 513, "B": 1, "H": 2, "K": 1},
    "tile-1025": {"S": 1025, "B": 1, "H": 1, "K": 1},
    "many-batches": {"B": 17, "S": 12},
    "many-heads": {"H": 32, "K": 8, "B": 1},
    "wide-tiles": {"D": 128, "S": 260, "B": 1, "H": 4, "K": 2},
    "wide-docs-window": {"D": 128, "S": 150, "docs": "packed", "window": 70, "B": 5, "H": 2},
    "wide-chunk": {"D": 128, "T": 70, "S": 200, "B": 1, "H": 2, "K": 1},
    "wide-full": {"D": 256, "T": 66, "S": 130, "causal": False, "B": 1, "H": 2, "K": 1},
    "wide-lse-backward": {"D": 128, "S": 140, "lse": "lse_backward", "B": 1, "H": 2, "K": 1},
    "fewer-keys-many-tiles": {"T": 300, "S": 40, "B": 1, "H": 2, "K": 1},
    "decode-long": {"T": 1, "S": 700},
    "lse-decode-longer": {"lse": "lse", "T": 1, "S": 2100, "B": 1, "H": 2, "K": 1},
    "chunk-long": {"T": 130, "S": 300, "B": 1, "H": 2, "K": 1},
    "window-docs-chunk": {"T": 40, "S": 90, "window": 9, "docs": "packed", "B": 2},
    "docs-each-its-own": {"docs": "alone"},
    "lse-backward-window-long": {"lse": "lse_backward", "window": 6, "S": 70, "B": 1},
    "lse-backward-long": {"lse": "lse_backward", "S": 270, "B": 1, "H": 2, "K": 1},
    "outliers-long": {"values": "outliers", "S": 200, "B": 1, "H": 2, "K": 1},
    "low-rank-long": {"values": "low_rank", "S": 300, "B": 1, "H": 2, "K": 1, "D": 32},
    "layout-fused-gqa-8": {"layout": "fused", "H": 8, "K": 1, "S": 65},
}
LAG = 3  # tokens


def cases(dtype: str, profile: Profile, seed: int) -> Iterator[Case]:
    table = QUICK | QUICK_BLOCKS
    if profile != "quick":
        table |= FULL | FULL_BLOCKS
    for name, options in table.items():
        slow = dtype == "float16" and options.get("S", 17) > 300  # float16 is slow on CPUs
        overflows = dtype == "float16" and options.get("upstream_scale", 1.0) > 1e4
        if not slow and not overflows:
            yield case(name, dtype, **options)
    for number, random in enumerate(drawn("attention", dtype, profile, seed)):
        yield case(f"drawn-{number}", dtype, **_drawn(random))


def case(
    name: str,
    dtype: str,
    *,
    B: int = 2,
    H: int = 4,
    K: int = 2,
    T: int | None = None,
    S: int = 17,
    D: int = 16,
    causal: bool = True,
    window: int | None = None,
    docs: str = "",
    offset: int | None = None,
    query_docs: bool = False,
    scale: float | None = None,
    lse: str = "",
    values: str | Mapping[str, str] = "normal",
    layout: str = "contiguous",
    layouts: Mapping[str, str] | None = None,
    upstream: tuple[str, ...] | None = None,
    upstream_layout: str = "contiguous",
    upstream_scale: float = 1.0,
    shift: float = 0.0,
) -> Case:
    """One call. docs: a kind of doc_ids, "" for none; query_docs: give query_doc_ids too.

    lse: "", "lse" (looked at) or "lse_backward" (differentiated too). shift: of the upstream.
    """
    T = S if T is None else T
    shapes = {"q": (B, H, T, D), "k": (B, K, S, D), "v": (B, K, S, D)}

    def draw(generator: Generator) -> dict[str, Tensor]:
        tensors = {
            n: _values(
                values if isinstance(values, str) else values.get(n, "normal"), shape, generator
            )
            for n, shape in shapes.items()
        }
        if docs and query_docs:
            first = S - T if offset is None else offset
            return tensors | _documents_of_both(docs, B, T, S, first, generator)
        return tensors | ({"doc_ids": _documents(docs, B, S, generator)} if docs else {})

    asked = {
        "causal": causal,
        "gqa": H != K,
        "window": window is not None,
        "doc_ids": bool(docs),
        "cross_length": T != S,
        "offset": offset is not None,
        "query_doc_ids": query_docs,
        "lse": bool(lse),
        "lse_backward": lse == "lse_backward",
    }
    options: dict[str, Any] = {"causal": causal}
    options |= {"window": window} if window is not None else {}
    options |= {"offset": offset} if offset is not None else {}
    options |= {"scale": scale} if scale is not None else {}
    options |= {"return_lse": True} if lse else {}
    outputs: dict[str, tuple[int, ...]] = {"out": (B, H, T, D)}
    outputs |= {"lse": (B, H, T)} if lse else {}
    given = ("out", "lse") if lse == "lse_backward" else ("out",)
    return Case(
        op="attention",
        name=name,
        dtype=dtype,
        draw=draw,
        options=options,
        features=frozenset(feature for feature, is_asked in asked.items() if is_asked),
        sizes={"B": B, "H": H, "K": K, "T": T, "S": S, "D": D},
        layouts={
            **{"": layout, "doc_ids": "contiguous", "query_doc_ids": "contiguous"},
            **(layouts or {}),
        },
        outputs=outputs,
        upstream=given if upstream is None else upstream,
        upstream_layout=upstream_layout,
        upstream_scale=upstream_scale,
        upstream_shift=shift,
    )


def _values(kind: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    if kind == "sharp":  # logits of up to +-75: softmax is nearly one-hot
        return 5 * DISTRIBUTIONS["normal"](shape, generator)
    if kind == "ones":
        return torch.ones(shape, dtype=torch.float64)
    if kind.startswith("ramp"):  # the highest logit of each tile is above (below) the last one's
        ends = (0, 12) if kind == "ramp_up" else (12, 0)
        steps = torch.linspace(*ends, shape[-2], dtype=torch.float64)
        return steps[:, None] / math.sqrt(shape[-1]) + 0.1 * DISTRIBUTIONS["normal"](
            shape, generator
        )
    return DISTRIBUTIONS[kind](shape, generator)


def _documents(kind: str, B: int, tokens: int, generator: Generator) -> Tensor:
    """packed: runs of one id, as in training; mixed: any order; alone: every token its own."""
    if kind == "alone":
        return torch.arange(tokens).expand(B, tokens).clone()
    if kind == "mixed":
        return torch.randint(-1, 3, (B, tokens), generator=generator)
    starts = torch.rand((B, tokens), generator=generator) < 0.2
    ids = starts.cumsum(-1)
    # In 32 bits every other document would be taken for the one before it, in float32 all.
    return ids.to(torch.int32) if kind == "int32" else ids // 2 + ids % 2 * 2**32 + 2**40


def _documents_of_both(
    kind: str, B: int, T: int, S: int, first: int, generator: Generator
) -> dict[str, Tensor]:
    """Of one sequence, in which a query's is that of the token LAG before its position: there the
    keys' would not tell it. first: the position of query 0.
    """
    start = first - LAG
    before = max(0, -start)  # tokens that come before the keys
    ids = _documents(kind, B, before + max(S, start + T), generator)
    own = ids[:, before + start :][:, :T]
    return {"doc_ids": ids[:, before:][:, :S], "query_doc_ids": own}


def _drawn(random: Random) -> dict[str, Any]:
    K = random.choice([1, 1, 2, 3])
    S = random.choice([1, 2, 8, 17, 31, 50, 66, random.randint(1, 140)])
    causal = random.random() < 0.7
    T = S if random.random() < 0.5 else random.randint(1, S + 5)
    docs = random.choice(["", "", "packed", "mixed"])
    offset = random.randint(-T, S + 3) if random.random() < 0.3 else None
    first = S - T if offset is None else offset
    among = 0 <= first <= S - T  # else the keys' documents do not tell the queries'
    return {
        "B": random.choice([1, 2, 3]),
        "H": K * random.choice([1, 2, 3, 4]),
        "K": K,
        "T": T,
        "S": S,
        "D": random.choice([4, 8, 16, 24, 31, 40, 64]),
        "causal": causal,
        "window": random.randint(1, S + 2) if causal and random.random() < 0.3 else None,
        "docs": docs,
        "offset": offset,
        "query_docs": bool(docs) and (not among or random.random() < 0.3),
        "scale": random.choice([None, None, 0.2, 0.7]),
        "lse": random.choice(["", "", "lse", "lse_backward"]),
        "values": random.choice(["normal", "shifted", "outliers", "tiny", "low_rank"]),
        "layout": random.choice([kind for kind in LAYOUTS if kind != "scalar"]),
        "upstream_layout": random.choice(LAYOUTS),
        "shift": random.choice([0.0, 1.0]),
    }
