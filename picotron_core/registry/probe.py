"""A tiny forward and backward on the real device, before a chosen kernel is trusted.

It catches what a declaration cannot know (a launch that fails, a wrong build, NaN, a missing
gradient). It is no proof of correctness: that is the conformance suite's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.ops.optimizer import STATES, AdamW
from picotron_core.registry.types import Code, Kernel, Reason, Request

# Relative to the norm of the reference. Wide: it must never accuse a right kernel, and the errors
# it is meant for (another mask, no gradient, garbage) are of the order of one.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}

Tensors = Sequence[Tensor]
Call = Callable[[Kernel, Tensors], tuple[Tensor, ...]]


def probe(kernel: Kernel, reference: Kernel, request: Request) -> Reason | None:
    """Run `kernel` and `reference` (on float32 copies) on one small case; None if they agree.

    A comm backend is not probed: its group is formed once, at `start`, which raises by itself.
    """
    if request.op == "comm" or request.device.simulated:
        return None
    case = CASES[request.op]
    dtype = getattr(torch, request.dtype)
    # An optimizer works in place on float32 state and has no backward.
    differentiate = request.training and request.op != "optimizer"
    inputs, call = case(request)
    try:
        found = _run(
            call,
            kernel,
            [t.to(dtype) if t.is_floating_point() else t for t in inputs],
            request.device.type,
            differentiate,
        )
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises here rules it out
        return _failed(f"raised {type(error).__name__}: {_first_line(error)}")
    wanted = _run(call, reference, inputs, "cpu", differentiate)
    for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if got is None or got.shape != want.shape:
            return _failed(f"result {number} has the wrong shape, or an input got no gradient")
        distance = torch.linalg.vector_norm(got.float().cpu() - want)
        if not distance <= TOLERANCE[dtype] * torch.linalg.vector_norm(want) + 1e-6:  # also if NaN
            return _failed(f"result {number} is not the reference's (error {distance:.2g})")
    return None


def _run(
    call: Call, kernel: Kernel, inputs: Tensors, device: str, differentiate: bool
) -> list[Tensor]:
    """Outputs, then the gradients of the floating inputs under fixed upstream gradients."""
    placed = [tensor.detach().clone().to(device) for tensor in inputs]
    wanted = [t.requires_grad_() for t in placed if t.is_floating_point() and differentiate]
    outputs = call(kernel, placed)
    if not differentiate:
        return [output.detach() for output in outputs]
    upstream = [_values(*output.shape, seed=99).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    return [*(output.detach() for output in outputs), *gradients]


def _values(*shape: int, seed: int) -> Tensor:
    """Normal values from a generator of their own: the global RNG is left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _failed(detail: str) -> Reason:
    return Reason(
        code=Code.PROBE_FAILED,
        detail=f"its trial run {detail}",
        fix="Update the backend's package, or report it to its authors",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _attention(request: Request) -> tuple[Tensors, Call]:
    ratio = max(1, request.sizes.get("H", 1) // request.sizes.get("K", 1))
    D, S = request.sizes.get("D", 16), 24
    T = 5 if "cross_length" in request.features else S
    arguments: dict[str, Any] = {"causal": "causal" in request.features}
    if "window" in request.features:
        arguments["window"] = 7
    documents = [torch.tensor([[0] * 10 + [1] * 14])] if "doc_ids" in request.features else []
    with_lse = "lse" in request.features

    def call(kernel: Kernel, tensors: Tensors) -> tuple[Tensor, ...]:
        q, k, v, *doc_ids = tensors
        extra = {"doc_ids": doc_ids[0]} if doc_ids else {}
        out = kernel(q, k, v, return_lse=with_lse, **arguments, **extra)
        # An lse that cannot be differentiated is looked at only as a value.
        if with_lse and "lse_backward" not in request.features:
            return (out[0],)
        return tuple(out) if with_lse else (out,)

    q, k, v = (_values(1, n, rows, D, seed=n + rows) for n, rows in ((ratio, T), (1, S), (1, S)))
    return [q, k, v + _values(1, 1, S, D, seed=7), *documents], call


def _norm(request: Request) -> tuple[Tensors, Call]:
    E = request.sizes.get("E", 32)
    return [_values(5, E, seed=1), _values(E, seed=2)], lambda kernel, x: (kernel(*x, eps=1e-5),)


def _rope(request: Request) -> tuple[Tensors, Call]:
    D = request.sizes.get("D", 16)
    angle = _values(6, D // 2, seed=3)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[Tensor, ...]:
        q, k = tensors
        return tuple(kernel(q, k, angle.cos().to(q.device), angle.sin().to(q.device)))

    return [_values(1, 2, 6, D, seed=1), _values(1, 1, 6, D, seed=2)], call


def _swiglu(request: Request) -> tuple[Tensors, Call]:
    return [_values(5, 33, seed=1), _values(5, 33, seed=2)], lambda kernel, x: (kernel(*x),)


def _loss(request: Request) -> tuple[Tensors, Call]:
    targets = torch.tensor([3, IGNORE_INDEX, 0, 36, 3])

    def call(kernel: Kernel, tensors: Tensors) -> tuple[Tensor, ...]:
        hidden, weight, labels = tensors
        return (kernel(hidden, weight, labels, ignore_index=IGNORE_INDEX),)

    E = request.sizes.get("E", 32)
    return [_values(5, E, seed=1), _values(37, E, seed=2) / E**0.5, targets], call


def _optimizer(request: Request) -> tuple[Tensors, Call]:
    hyper = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

    def call(kernel: Kernel, tensors: Tensors) -> tuple[Tensor, ...]:
        params, grads, *states = ([tensor] for tensor in tensors)
        kernel(params, grads, dict(zip(STATES, states, strict=True)), step=3, hyper=hyper)
        return tuple(tensors)

    param, grad, first, second = (_values(7, 5, seed=seed) for seed in range(4))
    return [param, grad, first, second.square()], call


CASES = {
    "attention": _attention,
    "norm": _norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "loss": _loss,
    "optimizer": _optimizer,
}
