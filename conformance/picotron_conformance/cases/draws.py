"""How many random cases a profile adds, and what they are drawn with."""

from __future__ import annotations

from random import Random

from picotron_conformance.check import Profile

DRAWN = {"quick": 4, "full": 100, "fuzz": 400}


def drawn(op: str, dtype: str, profile: Profile, seed: int) -> list[Random]:
    """One generator per random case: case number i of a seed is the same in every profile."""
    return [Random(f"{op} {dtype} {seed} {number}") for number in range(DRAWN[profile])]
