"""Whether results are right: golden values, their noise scale, and what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from picotron_conformance.check import Measurement, Record, WrongKernelError
from picotron_conformance.limits import DRAWS, LIMITS, ROW_SHARE
from picotron_conformance.rounding import EXACT, UNIT, Random, Rounding

# The smallest number that must not be flushed to zero. float16 underflows gradually wherever it is
# computed; float32 and bfloat16 may be flushed (CUDA's -ftz, SIMD flags).
SMALLEST = {
    torch.float64: 2.0**-1022,
    torch.float32: 2.0**-126,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-126,
}


@dataclass(frozen=True, slots=True)
class Golden:
    """The right value of one result, and how much a right kernel may scatter about it."""

    value: Tensor  # float64
    noise: Tensor  # float64, same shape: one standard deviation per element
    gain_noise: float  # of the factor on the whole
    distinct: int  # how many of its values differ: what is equal rounds alike, and averages nothing
    slack: float  # times every limit
    widest: float  # the largest root mean square of a draw's errors, over the noise: about 1, or
    # more where the elements' errors share a cause


def golden_of(
    compute: Callable[[Rounding], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype,
    tier: str,
    seed: int,
    coherent: bool = False,
) -> dict[str, Golden]:
    """Run a golden computation once exactly and `DRAWS` times with random roundings.

    coherent: the errors of all elements may point one way, as those of updates that are too small
        to change their parameter.
    """
    exact = compute(EXACT)
    generator = torch.Generator().manual_seed(seed)
    draws = [compute(Random(dtype, tier, generator)) for _ in range(DRAWS)]
    return {n: _golden(v, [draw[n] for draw in draws], coherent, tier) for n, v in exact.items()}


def _golden(value: Tensor, draws: Sequence[Tensor], coherent: bool, tier: str) -> Golden:
    finite = value.isfinite()
    errors = torch.stack([torch.where(finite, draw - value, 0.0) for draw in draws])
    unsettled = errors.isnan().any(0)  # `Rounding.shift`
    errors, finite = errors.nan_to_num(0), finite & ~unsettled
    spread = errors.square().mean(0).sqrt()
    noise = torch.maximum(spread, ROW_SHARE * _row_rms(spread))
    settled = torch.where(finite, value, 0.0)
    gains = torch.tensor([_gain(error, settled) for error in errors], dtype=torch.float64)
    relative = errors / noise.clamp(min=SMALLEST[torch.float64])
    widest = relative.reshape(len(draws), -1).square().mean(1).sqrt().max()
    power, moved = float(settled.square().sum()), noise * settled.abs()
    # A few runs may hide how far the factor moves; errors of the elements alone move it so far.
    least = float(moved.sum() if coherent else moved.square().sum().sqrt())
    distinct = len(torch.unique(value))
    # A lone number, and what is left of a cancellation, have no factor apart from their elements.
    drowned = distinct == 1 or power <= float(noise.square().sum())
    return Golden(
        value=value,
        noise=noise.masked_fill(unsettled, math.inf),
        slack=LIMITS["tier_b"].value if tier == "B" else 1.0,
        widest=float(widest) if value.numel() else 0.0,
        gain_noise=(
            math.inf if drowned else max(float(gains.square().mean().sqrt()), least / power)
        ),
        distinct=distinct,
    )


def judge(
    found: Mapping[str, Tensor | None],
    golden: Mapping[str, Golden],
    dtypes: Mapping[str, torch.dtype],
    record: Record,
    *,
    device: torch.device | None = None,
) -> None:
    """Compare every result with its golden value; all are measured before the first failure.

    Args:
        found: by name; None where autograd gave no gradient.
        dtypes: what each result must have.

    Raises: WrongKernelError for the first result that breaks a limit.
    """
    failures = []
    for name, right in golden.items():
        try:
            measurement = _measure(name, found.get(name), right, dtypes[name], device=device)
        except WrongKernelError as failure:
            failures.append(failure)
            continue
        record.measurements.append(measurement)
        if not measurement.worst <= 1:
            failures.append(_failure(measurement, golden, found))
    if failures:
        raise failures[0]


def _measure(
    name: str,
    found: Tensor | None,
    right: Golden,
    dtype: torch.dtype,
    *,
    device: torch.device | None,
) -> Measurement:
    wanted = right.value
    if not isinstance(found, Tensor):
        raise WrongKernelError(f"{name}: no tensor came back", hint="a gradient that is missing")
    if found.shape != wanted.shape:
        raise WrongKernelError(f"{name}: shape {tuple(found.shape)}, must be {tuple(wanted.shape)}")
    if found.dtype != dtype:
        raise WrongKernelError(f"{name}: dtype {found.dtype}, must be {dtype}")
    if device is not None and found.device.type != device.type:
        raise WrongKernelError(f"{name}: on device {found.device}, must be on {device}")
    value = found.detach().cpu().double()
    largest = torch.finfo(dtype).max
    # What is too large for the dtype must be infinite; within a rounding of its end, either is.
    wanted = torch.where(
        wanted.abs() > largest * (1 + 2 * UNIT[dtype]), wanted.sign() * math.inf, wanted
    )
    edge = (wanted.abs() > largest * (1 - 4 * UNIT[dtype])) & wanted.isfinite()
    _same_nonfinite(name, value, wanted, edge)
    settled = wanted.isfinite() & ~edge & right.noise.isfinite()
    noise = right.noise.nan_to_num(posinf=1.0).clamp(min=SMALLEST[dtype])
    error = torch.where(settled, value - wanted, 0.0)
    z = error.abs() / noise
    if z.numel() == 0:
        return Measurement(result=name, shape=tuple(value.shape), dtype=_name(dtype), fractions={})
    place = int(z.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), z.shape))
    unit = UNIT[dtype]
    bias = LIMITS["bias_float32" if dtype == torch.float32 else "bias"].value * unit
    element = LIMITS["element"].value
    alone = right.distinct == 1  # then a row and the tensor are an element, and averages of nothing
    whole = max(
        LIMITS["tensor"].value + LIMITS["few"].value / right.distinct**0.5,
        LIMITS["shared"].value * right.widest**2,
    )
    fractions = {
        "element": float(z.max()) / element,
        "row": float(_row_rms(z).max()) / (element if alone else LIMITS["row"].value),
        "tensor": float(z.square().mean().sqrt()) / (element if alone else whole),
        "bias": abs(_gain(error, torch.where(settled, wanted, 0.0)))
        / (bias + LIMITS["bias_noise"].value * right.gain_noise),
    }
    return Measurement(
        result=name,
        shape=tuple(value.shape),
        dtype=_name(dtype),
        fractions={limit: fraction / right.slack for limit, fraction in fractions.items()},
        index=index,
        found=float(value.flatten()[place]),
        wanted=float(wanted.flatten()[place]),
    )


def _same_nonfinite(name: str, found: Tensor, wanted: Tensor, edge: Tensor) -> None:
    """NaN and both infinities must stand exactly where the golden result has them."""
    kinds = {
        "NaN": (found.isnan(), wanted.isnan()),
        "inf": (found.isposinf(), wanted.isposinf()),
        "-inf": (found.isneginf(), wanted.isneginf()),
    }
    for kind, (here, there) in kinds.items():
        differ = (here != there) & ~edge
        if differ.any():
            index = tuple(differ.nonzero()[0].tolist())
            raise WrongKernelError(
                f"{name}{list(index)} is {float(found[index]):.6g}, must be "
                f"{float(wanted[index]):.6g} ({kind} in {int(differ.sum())} of {differ.numel()} "
                f"places that differ){_where(differ)}",
                hint="memory that was never written, a read outside of a tensor, 0 * inf in a mask",
            )


def _failure(
    measurement: Measurement,
    golden: Mapping[str, Golden],
    found: Mapping[str, Tensor | None],
) -> WrongKernelError:
    name = measurement.result
    limit, fraction = max(measurement.fractions.items(), key=lambda item: item[1])
    value, right = found[name], golden[name]
    assert value is not None
    noise = right.noise.clamp(min=SMALLEST[value.dtype])
    z = (value.detach().cpu().double() - right.value).abs().nan_to_num(0, 0, 0) / noise
    return WrongKernelError(
        f"{name}: {fraction:.3g} times the {limit} limit; worst at {list(measurement.index)}: "
        f"{measurement.found:.7g}, must be {measurement.wanted:.7g}"
        f"{_where(z > LIMITS['element'].value)}",
        hint=_HINTS[limit],
    )


_HINTS = {
    "element": "a wrong mask, index, scale or stride",
    "row": "a row, head or tile that is treated otherwise than the rest",
    "tensor": "an intermediate kept in too few bits",
    "bias": "a factor that is a little off everywhere, or rounding towards zero",
}


def _where(wrong: Tensor) -> str:
    """Which indices of each dim are wrong, where that is not all of them."""
    if not wrong.any() or wrong.dim() == 0:
        return ""
    parts = []
    for dim, size in enumerate(wrong.shape):
        others = [d for d in range(wrong.dim()) if d != dim]
        hit = wrong.any(dim=tuple(others)) if others else wrong
        if int(hit.sum()) < size:
            places = hit.nonzero().flatten().tolist()
            shown = ", ".join(map(str, places[:8])) + (", ..." if len(places) > 8 else "")
            parts.append(f"dim {dim}: {shown} of {size}")
    return f"; wrong {int(wrong.sum())} of {wrong.numel()}" + (
        f", only at {'; '.join(parts)}" if parts else ""
    )


def _row_rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt() if x.dim() else x.abs()


def _gain(error: Tensor, value: Tensor) -> float:
    """The factor by which `error` is a multiple of `value`, in the least squares sense."""
    value = value.nan_to_num(0, 0, 0)
    power = float(value.square().sum())
    return float((error * value).sum()) / power if power else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
