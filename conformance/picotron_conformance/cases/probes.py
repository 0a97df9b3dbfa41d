"""Inputs of small integers and powers of two: a right kernel rounds nowhere, so its bits are known.

Gradients are asked for in 16 bits alone: in float32 a softmax made again from its log-sum-exp errs
by the roundoff of that, which is far more than a unit in the last place of a weight of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from picotron_conformance.cases import attention, loss, norm, rope, swiglu
from picotron_conformance.problem import Case

Draw = Callable[[Generator], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """gradients: those whose bits are known too. means: what a wrong answer tells."""

    case: Case
    gradients: tuple[str, ...] = ()
    means: str


def probes_of(op: str, dtype: str) -> Iterator[Probe]:
    probes: dict[str, Callable[[str], Iterator[Probe]]] = {
        "attention": _attention,
        "norm": _norm,
        "rope": _rope,
        "swiglu": _swiglu,
        "loss": _loss,
    }
    for probe in probes[op](dtype):
        yield replace(probe, gradients=()) if dtype == "float32" else probe


# Needles: orthogonal codes (rows of a Hadamard matrix) make every softmax one-hot. Keys come in
# pairs of one code, of which one is stronger; so a query picks one known key, and would pick its
# neighbour if it saw one key more or one less.
NEEDLES: dict[str, dict[str, Any]] = {
    "plain": {"S": 23},
    "gqa": {"H": 6, "K": 2, "S": 37, "B": 3},
    "mqa-tiles": {"H": 4, "K": 1, "S": 128, "B": 1},
    "chunk": {"T": 5, "S": 97},
    "decode": {"T": 1, "S": 127},
    "window": {"S": 70, "window": 13},
    "window-chunk": {"S": 100, "T": 33, "window": 64, "B": 1},
    "fewer-keys": {"T": 20, "S": 9},
    "fused": {"S": 33, "layout": "fused", "H": 4, "K": 4},
    "strided": {"S": 33, "layout": "strided"},
    "docs": {"S": 66, "docs": "packed"},
    "offset": {"T": 30, "S": 21, "offset": -4},
    "offset-window": {"T": 33, "S": 70, "offset": 50, "window": 13},
    "query-docs": {"S": 66, "docs": "packed", "query_docs": True},
}


def _attention(dtype: str) -> Iterator[Probe]:
    for name, options in NEEDLES.items():
        for edge in ("last", "first"):
            case = attention.case(
                f"needle-{edge}-{name}", dtype, D=64, upstream_scale=0.0, shift=1.0, **options
            )
            yield Probe(
                case=replace(case, draw=_needles(case, edge)),
                gradients=("dv",),
                means=f"not the {edge} key that the query sees: a mask, an index or a tail is off",
            )
    # Equal logits over a power of two of keys: the mean of ones is one, and no rounding is needed.
    equal: dict[str, dict[str, Any]] = {
        "full": {"S": 64, "T": 9, "causal": False},
        "window": {"S": 40, "T": 9, "window": 32},
    }
    for name, options in equal.items():
        case = attention.case(f"uniform-{name}", dtype, **options)
        yield Probe(
            case=replace(case, draw=_uniform(case)), means="a sum over too many or too few keys"
        )


def _needles(case: Case, edge: str) -> Draw:
    B, H, K, T, S, D = (case.sizes[letter] for letter in "BHKTSD")
    window, first = case.options.get("window"), case.options.get("offset", S - T)

    def draw(generator: Generator) -> dict[str, Tensor]:
        drawn = case.draw(generator)
        codes = _hadamard(D)[torch.arange(S) // 2 % D]
        strong = torch.arange(S) % 2 == (1 if edge == "last" else 0)
        keys = codes * torch.where(strong, 4.5, 3.0)[:, None]
        q = torch.zeros(B, H, T, D, dtype=torch.float64)
        for b in range(B):
            for t in range(T):
                here = first + t
                oldest = max(0, here - window + 1) if window else 0
                seen = list(range(oldest, min(S, here + 1)))
                if "doc_ids" in drawn:
                    ids = drawn["doc_ids"][b]
                    own = drawn["query_doc_ids"][b][t] if "query_doc_ids" in drawn else ids[here]
                    seen = [s for s in seen if ids[s] == own]
                if seen:
                    q[b, :, t] = 3 * codes[seen[-1] if edge == "last" else seen[0]]
        # Odd, so never zero, and told apart by key, head and dim; exact in every dtype.
        v = 2.0 * torch.randint(0, 60, (B, K, S, D), generator=generator).double() + 1
        k = keys.expand(B, K, S, D).clone()
        return {**drawn, "q": q, "k": k, "v": v}

    return draw


def _uniform(case: Case) -> Draw:
    def draw(generator: Generator) -> dict[str, Tensor]:
        drawn = case.draw(generator)
        return {"q": drawn["q"] * 0, "k": drawn["k"], "v": torch.ones_like(drawn["v"])}

    return draw


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _norm(dtype: str) -> Iterator[Probe]:
    """The mean square plus eps is 1, so y is x times the weight."""
    for name, draw in {"constant": _constant_rows, "one-hot": _one_hot_rows}.items():
        case = norm.case(name, dtype, shape=(5, 64), eps=0.4375, upstream_scale=0.0, shift=1.0)
        yield Probe(
            case=replace(case, draw=draw),
            gradients=("dweight",),
            means="the mean is over the wrong elements, eps is not where it belongs, or an index",
        )


def _constant_rows(generator: Generator) -> dict[str, Tensor]:
    sign = 2.0 * torch.randint(0, 2, (5, 64), generator=generator).double() - 1
    return {"x": 0.75 * sign, "weight": _odd((64,), generator)}


def _one_hot_rows(generator: Generator) -> dict[str, Tensor]:
    x = torch.zeros(5, 64, dtype=torch.float64)
    x[torch.arange(5), torch.tensor([0, 63, 31, 32, 7])] = torch.tensor(
        [6.0, -6, 6, 6, -6]
    ).double()
    return {"x": x, "weight": _odd((64,), generator)}


def _rope(dtype: str) -> Iterator[Probe]:
    """Tables of 0, halves, ones and twos; at (1, 0) nothing turns."""
    for name, tables in {
        "identity": ((1.0,), (0.0,)),
        "quarter-turn": ((0.0,), (1.0,)),
        "half-turn": ((-1.0,), (0.0,)),
        "table": ((0.5, 1.0, 2.0, -1.0), (0.0, -0.5, 1.0)),
    }.items():
        case = replace(rope.case(name, dtype), upstream_scale=0.0, upstream_shift=1.0)
        yield Probe(
            case=replace(case, draw=_turns(case, *tables)),
            gradients=("dq", "dk"),
            means="pairs, signs or rows of the tables are mixed up",
        )


def _turns(case: Case, cosines: tuple[float, ...], sines: tuple[float, ...]) -> Draw:
    def draw(generator: Generator) -> dict[str, Tensor]:
        drawn = case.draw(generator)
        shape = drawn["cos"].shape
        return {
            "q": _odd(drawn["q"].shape, generator),
            "k": _odd(drawn["k"].shape, generator),
            "cos": _picked(cosines, shape, generator),
            "sin": _picked(sines, shape, generator),
        }

    return draw


def _swiglu(dtype: str) -> Iterator[Probe]:
    """A gate so far out that silu is the gate or nothing, or at 0, where its slope is a half."""

    def draw(generator: Generator) -> dict[str, Tensor]:
        gate = _picked((96.0, -1000.0, 0.0), (3, 43), generator)
        return {"gate": gate, "up": _odd((3, 43), generator)}

    case = swiglu.case("saturated", dtype, shape=(3, 43), upstream_scale=0.0, shift=1.0)
    yield Probe(
        case=replace(case, draw=draw),
        gradients=("dgate", "dup"),
        means="another activation, or gate and up mixed up",
    )


def _loss(dtype: str) -> Iterator[Probe]:
    V, E = 64, 64
    targets = torch.tensor([0, V - 1, 5, -100, 17])

    def uniform(generator: Generator) -> dict[str, Tensor]:
        # Columns of as many 1 as -1: dhidden is minus the target's row.
        weight = torch.cat((torch.ones(V // 2, E), -torch.ones(V // 2, E))).double()
        return {"hidden": torch.zeros(5, E).double(), "weight": weight, "targets": targets}

    def needle(generator: Generator) -> dict[str, Tensor]:
        codes = 3 * _hadamard(E)
        hidden = codes[torch.tensor([0, 3, 5, 6, 7])]  # tokens 0 and 2 are sure and right
        return {"hidden": hidden, "weight": codes, "targets": targets}

    plain = loss.case("", dtype, N=5, E=E, V=V, upstream=0.5)
    yield Probe(
        case=replace(plain, name="uniform", draw=uniform),
        gradients=("dhidden", "dweight"),
        means="log V for each valid token: a token or a part of the vocabulary is not counted",
    )
    yield Probe(
        case=replace(plain, name="needle", draw=needle),
        means="the logit of another target, or a token that does not count",
    )


def _odd(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Odd integers up to 15 of both signs."""
    return 2.0 * torch.randint(-8, 8, shape, generator=generator).double() + 1


def _picked(choices: tuple[float, ...], shape: tuple[int, ...], generator: Generator) -> Tensor:
    places = torch.randint(0, len(choices), shape, generator=generator)
    return torch.tensor(choices, dtype=torch.float64)[places]
