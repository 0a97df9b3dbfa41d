"""A tiny forward and backward on the real device, before a chosen kernel is trusted.

It catches what a declaration cannot know (a launch that fails, a wrong build, NaN, a missing
gradient). It is no proof of correctness: that is the conformance suite's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from picotron_core.errors import reason
from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.ops.optimizer import STATES, AdamW
from picotron_core.registry.types import Candidate, Code, Kernel, Level, Reason, Request

# Relative to the norm of the reference. Wide: it must never accuse a right kernel, and the errors
# it is meant for (another mask, no gradient, garbage) are of the order of one.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}

Tensors = Sequence[Tensor]
# Outputs whose gradient counts, then outputs that are only looked at.
Call = Callable[[Kernel, Tensors], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


def probe(kernel: Kernel, reference: Kernel, request: Request) -> Reason | None:
    """Run `kernel` and `reference` (on float32 copies) on one small case; None if they agree.

    Only batch and lengths are small: the sizes that a kernel may have asked for are the request's.
    A comm backend is not probed: its group is formed once, at `start`, which raises by itself.
    """
    if request.op == "comm" or request.device.simulated:
        return None
    inputs, call = CASES[request.op](request)
    dtype = getattr(torch, request.dtype)
    low = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    try:
        found = _run(call, kernel, low, request, request.device.type)
        wanted = _run(call, reference, inputs, request, "cpu")
        return _compare(found, wanted, request)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises here rules it out
        return _failed(f"raised {type(error).__name__}: {reason(error)}")


def reference_for(op: str, candidates: Iterable[Candidate]) -> Candidate | None:
    """The bundled backend whose level is plainly REFERENCE: what the others are tried against."""
    return next(
        (
            candidate
            for candidate in candidates
            if candidate.backend.op == op
            and candidate.provider.bundled
            and candidate.backend.level is Level.REFERENCE
        ),
        None,
    )


def _run(
    call: Call, kernel: Kernel, inputs: Tensors, request: Request, device: str
) -> list[Tensor | None]:
    """Outputs, then the gradients of the floating inputs under fixed upstream gradients."""
    # An optimizer works in place on float32 state, and has no backward.
    in_place = request.op == "optimizer"
    placed = [tensor.detach().to(device, copy=True) for tensor in inputs]
    wanted = [t.requires_grad_() for t in placed if t.is_floating_point() and not in_place]
    outputs, looked_at = call(kernel, placed)
    gradients: Sequence[Tensor | None] = ()
    if request.training and not in_place:
        upstream = [_values(*output.shape, seed=99).to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    for before, after in zip(inputs, placed, strict=True):
        if not in_place and not torch.equal(before, after.detach().to(before.device)):
            raise ValueError("it changed its inputs")
    return [*(output.detach() for output in (*outputs, *looked_at)), *gradients]


def _compare(
    found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], request: Request
) -> Reason | None:
    dtype = getattr(torch, request.dtype)
    # Attention's second output, the lse, and the loss are float32, whatever goes in.
    with_lse = request.op == "attention" and {"lse", "lse_backward"} & request.features
    wide = {1} if with_lse else {0} if request.op == "loss" else set()
    for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert want is not None
        if got is None or got.shape != want.shape:
            return _failed(f"result {number} has the wrong shape, or an input got no gradient")
        if got.dtype != (torch.float32 if number in wide else dtype):
            return _failed(f"result {number} is {got.dtype} for inputs of {dtype}")
        if got.device.type != request.device.type:
            return _failed(f"result {number} is on {got.device}, not where its inputs are")
        got = got.float().cpu()
        # Two equal infinities, the lse of a query that sees nothing, are no distance but NaN.
        distance = torch.linalg.vector_norm((got - want)[got != want])
        size = torch.linalg.vector_norm(want[want.isfinite()])
        if not distance <= TOLERANCE[dtype] * size + 1e-6:  # also if NaN
            return _failed(f"result {number} is not the reference's (error {distance:.2g})")
    return None


def _values(*shape: int, seed: int) -> Tensor:
    """Normal values from a generator of their own: the global RNG is left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _failed(detail: str) -> Reason:
    return Reason(
        code=Code.PROBE_FAILED,
        detail=f"its trial run {detail}",
        fix="Update the backend's package, or report it to its authors",
    )


def _attention(request: Request) -> tuple[Tensors, Call]:
    ratio = max(1, request.sizes.get("H", 1) // request.sizes.get("K", 1))
    K = min(2, request.sizes.get("K", 1))
    B, D, S = 2, request.sizes.get("D", 16), 24
    T = S
    if "cross_length" in request.features:
        T = 1 if request.sizes.get("T") == 1 else 5
    arguments: dict[str, Any] = {"causal": "causal" in request.features}
    if "window" in request.features:
        arguments["window"] = 7
    if "offset" in request.features:
        # Two keys before the last; or at the first, where the queries' documents are the keys'.
        at_keys = "doc_ids" in request.features and "query_doc_ids" not in request.features
        arguments["offset"] = max(0, S - T - 2) if at_keys else S - T - 2
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 18 + [2] * 3])
    with_lse = bool({"lse", "lse_backward"} & request.features)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # Laid out as a model makes them: the heads are views of rows of (B, T, heads * D).
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors[:3])
        extra = {"doc_ids": tensors[3]} if "doc_ids" in request.features else {}
        if "query_doc_ids" in request.features:
            extra["query_doc_ids"] = tensors[3][:, :T] + 1
        out = kernel(q, k, v, return_lse=with_lse, **arguments, **extra)
        if not with_lse:
            return (out,), ()
        return (tuple(out), ()) if "lse_backward" in request.features else (out[:1], out[1:])

    q = _values(B, T, K * ratio, D, seed=1)
    k, v = _values(B, S, K, D, seed=2), _values(B, S, K, D, seed=3)
    return [q, k, v, documents], call


def _norm(request: Request) -> tuple[Tensors, Call]:
    E = request.sizes.get("E", 64)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (kernel(*tensors, eps=0.1),), ()  # large enough to be missed where it is dropped

    return [_values(2, 4, E, seed=1), _values(E, seed=2)], call


def _rope(request: Request) -> tuple[Tensors, Call]:
    D, K = request.sizes.get("D", 16), min(2, request.sizes.get("K", 1))
    angle = _values(6, D // 2, seed=3)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        q, k = (tensor.transpose(1, 2) for tensor in tensors)
        return tuple(kernel(q, k, angle.cos().to(q.device), angle.sin().to(q.device))), ()

    return [_values(2, 6, 2 * K, D, seed=1), _values(2, 6, K, D, seed=2)], call


def _swiglu(request: Request) -> tuple[Tensors, Call]:
    F = request.sizes.get("F", 64)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (kernel(*tensors),), ()

    return [_values(2, 4, F, seed=1), _values(2, 4, F, seed=2)], call


def _loss(request: Request) -> tuple[Tensors, Call]:
    # A real vocabulary's weight may take gigabytes; 1024 keeps what its size is a multiple of.
    E, V = request.sizes.get("E", 64), min(1024, request.sizes.get("V", 64))
    targets = torch.tensor([3, IGNORE_INDEX, 0, V - 1, 3, 1, 1, IGNORE_INDEX])

    def call(kernel: Kernel, tensors: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        hidden, weight, labels = tensors
        return (kernel(hidden, weight, labels, ignore_index=IGNORE_INDEX),), ()

    return [_values(8, E, seed=1), _values(V, E, seed=2) / E**0.5, targets], call


def _optimizer(request: Request) -> tuple[Tensors, Call]:
    hyper = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-2, weight_decay=0.1)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        params, grads, *states = ([tensor] for tensor in tensors)
        kernel(params, grads, dict(zip(STATES, states, strict=True)), step=3, hyper=hyper)
        return (), tuple(tensors)

    param, grad, first, second = (_values(7, 64, seed=seed) for seed in range(4))
    return [param, grad, first, second.square()], call


CASES = {
    "attention": _attention,
    "norm": _norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "loss": _loss,
    "optimizer": _optimizer,
}
