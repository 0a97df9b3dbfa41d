"""The grid of cases, one file an op: corners that must be there, then random draws.

`cases(dtype, profile, seed)` names every case that a backend may be asked; `supports` decides which
of them it claims. The tables list what differs from a plain case, so that each row says why it is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from picotron_conformance.calling import Case
from picotron_conformance.cases import attention, loss, norm, rope, swiglu
from picotron_conformance.check import Profile

DTYPES = ("float32", "bfloat16", "float16")
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
    cases = tuple(_GRIDS[op](dtype, profile, seed))
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), f"two cases of {op} share a name: {sorted(names)}"
    return cases


def plain(op: str, dtype: str) -> Case:
    """The op's first case: small, and with nothing special about it."""
    return cases_of(op, dtype, "quick", 0)[0]
