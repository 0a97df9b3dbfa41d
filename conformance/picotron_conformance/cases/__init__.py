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
from picotron_conformance.inputs import FAR
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
        case
        for case in _GRIDS[op](dtype, profile, seed)
        if dtype != "float32" or FAR not in case.layouts.values()
    )
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), f"two cases of {op} share a name: {sorted(names)}"
    return cases


def growing(op: str, dtype: str) -> list[Case]:
    """Two plain cases, the second of twice the length: T and S, N and V, or the rows.

    So long that blocks of a fixed size, and what is allocated once, no longer count.
    """
    grown: dict[str, tuple[Callable[..., Case], list[dict[str, Any]]]] = {
        "attention": (attention.case, [{"B": 1, "H": 1, "K": 1, "S": S} for S in (2048, 4096)]),
        "norm": (norm.case, [{"shape": (rows, 64)} for rows in (4096, 8192)]),
        "rope": (rope.case, [{"T": T} for T in (2048, 4096)]),
        "swiglu": (swiglu.case, [{"shape": (rows, 64)} for rows in (4096, 8192)]),
        "loss": (loss.case, [{"N": length, "V": length} for length in (4096, 8192)]),
    }
    make, options = grown[op]
    return [make(f"growing-{number}", dtype, **given) for number, given in enumerate(options)]
