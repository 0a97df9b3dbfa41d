"""The comparator itself: what it must not overlook, and what it must not accuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from picotron_conformance.check import Record, WrongKernelError
from picotron_conformance.judge import golden_of, judge
from picotron_conformance.rounding import Rounding
from torch import Tensor

N = 48


def _golden(exact: Tensor) -> Callable[[Rounding], dict[str, Tensor]]:
    return lambda at: {"y": at.stored(exact)}


def _judge(found: object, exact: Tensor, dtype: torch.dtype = torch.float32) -> Record:
    """`found` against `exact`, which a right kernel rounds once, to `dtype`."""
    golden = golden_of(_golden(exact), dtype=dtype, tier="A", seed=0)
    record = Record()
    judge({"y": found}, golden, {"y": dtype}, record)  # type: ignore[dict-item]
    return record


def _values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _rejected(found: object, exact: Tensor, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(WrongKernelError) as wrong:
        _judge(found, exact, dtype)
    return wrong.value.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rounded_right_value_passes(dtype: torch.dtype) -> None:
    exact = _values(8, N)
    (measurement,) = _judge(exact.to(dtype), exact, dtype).measurements
    assert measurement.worst <= 1


def test_a_nan_that_is_expected_is_no_wildcard() -> None:
    exact = _values(8, N)
    exact[3, 5] = math.nan
    found = exact.float()
    _judge(found, exact)
    assert "[3, 5]" in _rejected(found.nan_to_num(0.0), exact)
    found[2, 2] = 7.0  # beside it
    assert "[2, 2]" in _rejected(found, exact)


def test_a_nan_that_is_not_expected_fails() -> None:
    exact = _values(8, N)
    found = exact.float()
    found[7, 47] = math.nan
    assert "[7, 47]" in _rejected(found, exact)


@pytest.mark.parametrize("kind", [math.inf, -math.inf])
def test_the_sign_of_an_infinity_counts(kind: float) -> None:
    exact = _values(8, N)
    exact[0, 0] = kind
    found = exact.float()
    _judge(found, exact)
    for other in (-kind, math.nan, 3e38):
        found[0, 0] = other
        assert "[0, 0]" in _rejected(found, exact)


def test_an_infinity_that_is_not_expected_fails() -> None:
    exact = _values(8, N)
    found = exact.float()
    found[1, 1] = math.inf
    assert "[1, 1]" in _rejected(found, exact)


def test_what_is_too_large_for_the_dtype_must_be_infinite() -> None:
    exact = torch.tensor([[1.0, 7e4]], dtype=torch.float64)
    _judge(torch.tensor([[1.0, math.inf]]).half(), exact, torch.float16)
    assert _rejected(torch.tensor([[1.0, 65504.0]]).half(), exact, torch.float16)


@pytest.mark.parametrize("shape", [(N, 1), (1, N), (N,), (1, N, N)])
def test_a_shape_that_would_broadcast_fails(shape: tuple[int, ...]) -> None:
    exact = torch.ones(N, N, dtype=torch.float64)
    assert "shape" in _rejected(torch.ones(shape), exact)


def test_another_dtype_fails_though_its_values_are_right() -> None:
    exact = _values(8, N)
    assert "dtype" in _rejected(exact.float(), exact, torch.bfloat16)
    assert "dtype" in _rejected(exact, exact)
    assert "dtype" in _rejected(exact.half(), exact, torch.bfloat16)


@pytest.mark.parametrize("nothing", [None, 1.0, [1.0]])
def test_what_is_no_tensor_fails(nothing: object) -> None:
    assert _rejected(nothing, _values(8, N))


def test_a_result_that_is_not_there_at_all_fails() -> None:
    exact = _values(8, N)
    golden = golden_of(_golden(exact), dtype=torch.float32, tier="A", seed=0)
    with pytest.raises(WrongKernelError):
        judge({}, golden, {"y": torch.float32}, Record())


def test_nothing_equals_nothing_of_the_same_shape_alone() -> None:
    exact = _values(0, N)
    _judge(exact.float(), exact)
    assert _rejected(torch.empty(N, 0), exact)
    assert _rejected(torch.empty(0, N, dtype=torch.float16), exact)


def test_zeros_must_be_zeros() -> None:
    """Where nothing is rounded there is no noise to hide in."""
    exact = torch.zeros(8, N, dtype=torch.float64)
    _judge(exact.float(), exact)
    _judge(-exact.float(), exact)
    found = exact.float()
    found[2, 3] = 1e-30
    assert "[2, 3]" in _rejected(found, exact)


def test_a_row_of_zeros_beside_large_rows_must_be_zeros() -> None:
    exact = _values(8, N) * 1e3
    exact[4] = 0
    found = exact.float()
    _judge(found, exact)
    found[4, 0] = 1e-6
    assert "[4, 0]" in _rejected(found, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    exact = _values(64, N)
    found = exact.to(dtype)
    found[63, 47] += 64 * torch.finfo(dtype).eps
    assert "[63, 47]" in _rejected(found, exact, dtype)


def test_one_wrong_row_fails() -> None:
    exact = _values(64, N)
    found = exact.bfloat16()
    found[9] = (exact[9] * 1.03).bfloat16()
    assert _rejected(found, exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_error_in_one_direction_fails_where_each_element_would_pass(
    dtype: torch.dtype,
) -> None:
    exact = _values(64, N)
    factor = 1 + (8 if dtype == torch.float32 else 0.5) * torch.finfo(dtype).eps
    assert _rejected((exact * factor).to(dtype), exact, dtype)


def test_rounding_towards_zero_fails() -> None:
    exact = _values(64, N)
    cut = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert "bias" in _rejected(cut, exact, torch.bfloat16)


def test_too_few_bits_everywhere_fail() -> None:
    exact = _values(64, N)
    assert _rejected(exact.bfloat16().half(), exact, torch.float16)
    assert _rejected(exact.half().float(), exact)


def test_a_swapped_pair_fails() -> None:
    exact = _values(8, N)
    found = exact.float()
    found[0, [0, 1]] = found[0, [1, 0]]
    assert _rejected(found, exact)


def test_all_results_are_measured_though_the_first_one_fails() -> None:
    exact = _values(8, N)

    def compute(at: Rounding) -> dict[str, Tensor]:
        return {"dq": at.stored(exact), "dk": at.stored(exact)}

    golden = golden_of(compute, dtype=torch.float32, tier="A", seed=0)
    record, right = Record(), exact.float()
    dtypes = dict.fromkeys(golden, torch.float32)
    with pytest.raises(WrongKernelError, match="dq"):
        judge({"dq": right * 2, "dk": right}, golden, dtypes, record)
    assert [measurement.result for measurement in record.measurements] == ["dq", "dk"]


def test_infinite_and_missing_values_do_not_hide_the_others() -> None:
    """The sums over a tensor leave out what is not finite, and nothing else."""
    exact = _values(8, N)
    exact[0, 0], exact[1, 1] = math.inf, math.nan
    found = exact.float()
    found[5] *= 1.001
    assert _rejected(found, exact)
