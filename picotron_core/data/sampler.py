"""The order of the samples, as a function of one integer.

Sample number i of a run is window P(i mod n) of epoch i div n, where P is a permutation of n that
(seed, epoch) selects. Nothing is stored or drawn in turn, so any rank can find any step's samples
alone, and to resume is to know the step.

P is a Feistel network: halves (L, R) -> (R, L xor F(R)), a bijection for any F. It permutes a
power of four, and whoever lands outside n is sent through again until inside (cycle walking), which
keeps it a bijection (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from picotron_core.errors import ConfigError

Words = npt.NDArray[np.uint64]

ROUNDS = 8
LARGEST = 2**62


@dataclass(frozen=True, slots=True)
class Sampler:
    """An endless order of `num_samples` windows, each once an epoch, anew shuffled each epoch."""

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= LARGEST:
            raise ConfigError(f"A sampler orders 1 to 2**62 samples, not {self.num_samples}.")

    def sample(self, index: int) -> int:
        """The window of global sample `index` (0, 1, ...)."""
        return int(self.samples(index, 1)[0])

    def samples(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The windows of global samples start ... start + count - 1: (count,) int64."""
        if start < 0 or count < 0 or start + count > 2**63:
            raise ConfigError(f"No samples {start} to {start + count}: they count from 0 to 2**63.")
        index = np.arange(count, dtype=np.uint64) + np.uint64(start)
        n = np.uint64(self.num_samples)
        keys = _mix(_mix(np.array([self.seed % 2**64], dtype=np.uint64)) + index // n)
        return _permute(index % n, keys, self.num_samples).astype(np.int64)


def _permute(x: Words, keys: Words, n: int) -> Words:
    """x -> P(x) below n, each element under its own key."""
    half = max(3, ((n - 1).bit_length() + 1) // 2)
    x = _feistel(x, keys, half)
    while (outside := x >= n).any():
        x[outside] = _feistel(x[outside], keys[outside], half)
    return x


def _feistel(x: Words, keys: Words, half: int) -> Words:
    """A permutation of 2**(2 half), which is below 4 n, so that few steps lead back inside."""
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = x >> shift, x & mask
    for number in range(ROUNDS):
        f = _mix(_mix(keys + np.uint64(number)) ^ right) & mask
        left, right = right, left ^ f
    return left << shift | right


def _mix(x: Words) -> Words:
    """SplitMix64's step and finaliser: every bit of x moves every bit of the result (wraps)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
