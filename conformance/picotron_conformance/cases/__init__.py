"""The grid of cases, one file an op: corners that must be there, then random draws.

`cases(dtype, profile, seed)` names every case that a backend may be asked; `supports` decides which
of them it claims. The tables list what differs from a plain case, so that each row says why it is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from picotron_conformance.cases import attention, loss, norm, rope, swiglu
from picotron_conformance.check import Profile
from picotron_conformance.problem import Case

DTYPES = ("float32", "bfloat16", "float16")
# What a run of some size asks of each op.
PLAIN_SIZES: dict[str, dict[str, int]] = {
    "attention": {"B": 2, "H": 8, "K": 2, "T": 64, "S": 64, "D": 64},
    "norm": {"N": 64, "E": 128},
    "rope": {"B": 2, "H": 8, "K": 2, "T": 64, "D": 64},
    "swiglu": {"N": 64, "F": 128},
    "loss": {"N": 64, "E": 128, "V": 1000},
    "optimizer": {},
    "comm": {"world": 2},
}
_GRIDS: dict[str, Callable[[str, Profile, int], Iterable[Case]]] = {
    "attention": attention.cases,
    "norm": norm.cases,
    "rope": rope.cases,
    "swiglu": swiglu.cases,
    "loss": loss.cases,
}


@lru_cache(maxsize=256)
def cases_of(op: str, dtype: str, profile: Profile, seed: int) -> tuple[Case, ...]:
    """All cases of an op in a profile. Made once: golden results are kept by case."""
    # In float32 the far rows would take 8 GiB, which some machines do not even promise.
    cases = tuple(
        case for case in _GRIDS[op](dtype, profile, seed) if dtype != "float32" or not case.is_far
    )
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), f"two cases of {op} share a name: {sorted(names)}"
    return cases


Options = dict[str, Any]
_GROWN: dict[str, tuple[Callable[..., Case], Callable[[int], Options], int]] = {
    "attention": (attention.case, lambda S: {"B": 1, "S": S}, 2048),
    "norm": (norm.case, lambda rows: {"shape": (rows, 64)}, 4096),
    "rope": (rope.case, lambda T: {"T": T}, 2048),
    "swiglu": (swiglu.case, lambda rows: {"shape": (rows, 64)}, 4096),
    "loss": (loss.case, lambda length: {"N": length, "V": length}, 4096),
}
_GROWN_WITH: dict[str, dict[str, Options]] = {
    "attention": {
        "plain": {"H": 1, "K": 1},
        "gqa": {"H": 2, "K": 1},
        "full": {"H": 1, "K": 1, "causal": False},
        "docs": {"H": 1, "K": 1, "docs": "packed"},
        "window": {"H": 1, "K": 1, "window": 100},
        "lse": {"H": 1, "K": 1, "lse": "lse_backward"},
        "offset": {"H": 1, "K": 1, "offset": 50},
        "query-docs": {"H": 1, "K": 1, "docs": "packed", "query_docs": True},
    }
}


def growing(op: str, dtype: str) -> list[tuple[Case, Case]]:
    """Pairs of cases, the second of twice the length: T and S, N and V, or the rows.

    So long that blocks of a fixed size, and what is allocated once, no longer count. The plain pair
    comes first; a mask, a group or a window may be served by other code.
    """
    make, base, length = _GROWN[op]
    pairs = []
    for name, more in _GROWN_WITH.get(op, {"plain": {}}).items():
        first = length if name == "plain" else length // 2  # the others take a mask's time
        small, large = (
            make(f"growing-{name}-{number}", dtype, **base(first * number), **more)
            for number in (1, 2)
        )
        pairs.append((small, large))
    return pairs
