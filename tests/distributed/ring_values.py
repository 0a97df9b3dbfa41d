"""One rank of `test_ring.py`: the conformance suite's questions to a ring of ranks.

Every rank asks the same questions of a kernel that takes whole sequences, gives each rank its part,
and puts the ring's answers together again. Prints what was wrong; or, when asked for
the peak, the bytes that a sequence of 8192 tokens takes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from picotron_conformance.calling import judge_run, run
from picotron_conformance.cases.attention import case
from picotron_conformance.check import Record, WrongKernelError
from picotron_conformance.launched import peak_bytes
from picotron_conformance.problem import Case
from picotron_conformance.run import target_of
from torch import Tensor

from picotron_core.hardware import profile
from picotron_core.parallel.context import own, ring
from picotron_core.parallel.mesh import Axis, make_mesh
from picotron_core.parallel.world import join
from picotron_core.registry.plugins import load_registry

CPU = torch.device("cpu")


class Part(torch.autograd.Function):
    """Forward: this rank's chunks of whole sequences; backward: all_gather over cp."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, cp: Axis) -> Tensor:
        ctx.cp = cp
        return own(whole, cp.index, cp.size, dim=2).contiguous()

    @staticmethod
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None]:
        return gathered(dpart, ctx.cp), None


class Whole(torch.autograd.Function):
    """Forward: all_gather over cp; backward: this rank's chunks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cp: Axis) -> Tensor:
        ctx.cp = cp
        return gathered(part, cp)

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:
        return own(dwhole, ctx.cp.index, ctx.cp.size, dim=2).contiguous(), None


def gathered(part: Tensor, cp: Axis) -> Tensor:
    every = part.new_empty(cp.size * part.shape[0], *part.shape[1:])
    cp.all_gather(every, part.contiguous())
    halves = [each.chunk(2, dim=2) for each in every.chunk(cp.size)]
    early, late = zip(*halves, strict=True)
    return torch.cat((*early, *reversed(late)), dim=2)


def over_ranks(attention: Any, cp: Axis) -> Any:
    around = ring(attention, cp)

    def kernel(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Any:
        parts = (Part.apply(tensor, cp) for tensor in (q, k, v))  # type: ignore[no-untyped-call]
        answer = around(*parts, **asked)
        if isinstance(answer, tuple):
            return tuple(Whole.apply(part, cp) for part in answer)  # type: ignore[no-untyped-call]
        return Whole.apply(answer, cp)  # type: ignore[no-untyped-call]

    return kernel


def questions(ranks: int) -> Iterator[Case]:
    chunk = 2 * ranks
    forms: dict[str, dict[str, Any]] = {
        "causal": {"S": 4 * chunk},
        "full": {"S": 3 * chunk, "causal": False},
        "one-token-chunks": {"S": chunk},
        "mha": {"S": 3 * chunk, "K": 4},
        "scale": {"S": 3 * chunk, "scale": 0.3},
        "docs": {"S": 5 * chunk, "docs": "packed", "B": 3},
        "docs-mixed": {"S": 5 * chunk, "docs": "mixed"},
        "docs-full": {"S": 5 * chunk, "docs": "packed", "causal": False},
        "lse-backward": {"S": 4 * chunk, "lse": "lse_backward"},
        **{f"window-{w}": {"S": 4 * chunk, "window": w} for w in (1, 4, 5, 6, 11, 1000)},
        "window-docs": {"S": 5 * chunk, "window": 7, "docs": "packed", "lse": "lse_backward"},
        "outliers": {"S": 4 * chunk, "values": "outliers", "D": 32},
        "large-v": {"S": 4 * chunk, "values": {"v": "large"}},
        "tiles": {"S": 42 * chunk, "B": 1, "H": 2, "K": 1},
    }
    for name, options in forms.items():
        yield case(name, "float32", **options)
        if name in ("causal", "docs", "window-6", "lse-backward"):
            yield case(name, "bfloat16", **options)
    yield case("causal", "float16", S=chunk, B=1)


def main(backend: str, what: str) -> None:
    torch.set_num_threads(1)
    world = join(timeout_s=60)
    candidates = load_registry().candidates
    comm = next(c for c in candidates if c.backend.name == "gloo-cpu").backend.load()
    comm.start(store=world.store, rank=world.rank, world_size=world.size, device=CPU, timeout_s=60)
    cp = make_mesh(comm, rank=world.rank, world_size=world.size, cp=world.size).cp
    (candidate,) = (
        c for c in candidates if (c.backend.op, c.backend.name) == ("attention", backend)
    )
    target = target_of(candidate, device=profile("cpu"), profile="quick", seed=1)
    attention = target.kernel
    target = replace(target, kernel=over_ranks(attention, cp))
    wrong, asked, peak = [], 0, 0
    if what == "peak":
        peak = peak_of(ring(attention, cp), tokens=8192 // world.size)
    for question in questions(world.size) if what == "values" else ():
        for training in (False, True):
            found = run(target, question, training=training)
            asked += 1
            try:
                judge_run(target, question, found, Record(), training=training)
            except WrongKernelError as error:
                wrong.append(f"{question.name} {question.dtype}: {error.detail}")
    comm.stop()
    print(json.dumps({"wrong": wrong, "asked": asked, "peak": peak}))


def peak_of(attention: Any, *, tokens: int) -> int:
    """Bytes at the peak of one forward and backward, beyond q, k and v."""
    q, k = torch.randn(1, 2, tokens, 64), torch.randn(1, 1, tokens, 64)
    leaves = [q.requires_grad_(), k.requires_grad_(), k.detach().clone().requires_grad_()]

    def forward_and_backward() -> None:
        out = attention(*leaves, causal=True)
        torch.autograd.grad(out, leaves, out.detach())

    # The lesser: on a busy machine a transport's thread lets go of its buffers late.
    found = []
    for _ in range(2):
        found.append(peak_bytes(forward_and_backward, CPU))
        time.sleep(0.5)  # or what is let go of then would be taken off the next
    return min(found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
