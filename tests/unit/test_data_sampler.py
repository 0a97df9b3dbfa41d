"""The order: a bijection each epoch, another for each epoch and seed, and evenly spread."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picotron_core.data.sampler import LARGEST, Sampler
from picotron_core.errors import ConfigError


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097, 100_003])
def test_every_epoch_is_a_bijection(n):
    sampler = Sampler(n, seed=3)
    for epoch in (0, 1, 12_345):
        assert np.array_equal(np.sort(sampler.samples(epoch * n, n)), np.arange(n))


@given(
    n=st.integers(1, LARGEST),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, LARGEST),
    count=st.integers(1, 40),
)
def test_a_sample_is_a_function_of_its_index_alone(n, seed, start, count):
    sampler = Sampler(n, seed)
    several = sampler.samples(start, count)
    assert several.dtype == np.int64
    assert several.tolist() == [sampler.sample(i) for i in range(start, start + count)]
    assert ((several >= 0) & (several < n)).all()
    if start // n == (start + count - 1) // n:
        assert len(set(several.tolist())) == count


def test_epochs_and_seeds_differ():
    n = 5000
    orders = [Sampler(n, seed).samples(epoch * n, n) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders agree in about one place.
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.07


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from what a uniform choice would give."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_every_order_of_four_is_about_as_frequent():
    orders = Sampler(4, seed=1).samples(0, 4 * 24_000).reshape(-1, 4)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == math.factorial(4)
    assert chi_square(np.array(list(counts.values()))) < 5


def test_each_window_is_as_likely_at_each_place():
    n, epochs = 50, 20_000
    orders = Sampler(n, seed=7).samples(0, n * epochs).reshape(epochs, n)
    for place in (0, 1, 25, 49):
        assert abs(chi_square(np.bincount(orders[:, place], minlength=n))) < 5


def test_neighbours_are_not_related():
    n = 100_000
    order = Sampler(n, seed=0).samples(0, n)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    steps = np.bincount((np.diff(order) % n) * 100 // n, minlength=100)
    assert abs(chi_square(steps)) < 5


def test_the_order_of_a_seed_is_for_ever():
    # A resumed run must see the samples that the interrupted one would have seen.
    first, second = [2, 0, 5, 1, 4, 6, 7, 8, 3, 9], [4, 1, 9, 0, 3, 2, 6, 8, 7, 5]
    assert Sampler(10, seed=0).samples(0, 20).tolist() == first + second


def test_bounds_are_errors():
    for n in (0, -1, LARGEST + 1):
        with pytest.raises(ConfigError, match=f"not {n}"):
            Sampler(n, 0)
    with pytest.raises(ConfigError, match="No samples -1"):
        Sampler(3, 0).samples(-1, 2)
