"""Right kernels, until one rank is struck: killed, stopped, or made to raise.

FAULT is "KIND PHASE RANK FILE": what happens, in which of forward, backward, step and save, to
whom, and where the time of it is noted.

`comm=faults/clinging` is gloo as NCCL behaves: it does not come back from a rank that is lost.
`comm=faults/queued` is as NCCL behaves with a short queue: its calls return, and what comes next
does not.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from picotron_backends.naive_math.norm import rms_norm
from picotron_backends.naive_math.optimizer import adamw
from picotron_backends.torch_distributed import TorchComm

from picotron_core.registry import Backend, Level, hookimpl

KIND, PHASE, RANK, FILE = os.environ.get("FAULT", "none none none none").split()
LAST = {"forward": 9, "backward": 9, "step": 1, "save": 1}  # the call that is struck: in step 2
calls: Counter[str] = Counter()
stuck: list[str] = []


def strike(phase: str) -> None:
    if stuck:
        time.sleep(3600)
    if "train" not in sys.argv or (phase, os.environ.get("RANK")) != (PHASE, RANK):
        return  # as in the trial of a plugin
    calls[phase] += 1
    if calls[phase] != LAST[phase]:
        return
    Path(FILE).write_text(str(time.time()))
    if KIND == "raise":
        raise ValueError(f"struck in {phase}")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[KIND])


class Backward(torch.autograd.Function):
    """Forward: identity; backward: may be struck."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        strike("backward")
        return dout


def norm(x, weight, *, eps):
    strike("forward")
    return rms_norm(Backward.apply(x), weight, eps=eps)


def optimizer(params, grads, states, *, step, hyper):
    adamw(params, grads, states, step=step, hyper=hyper)
    if step == 2:
        strike("step")


class Clinging(TorchComm):
    def all_reduce(self, *args, **more):
        return Clings(super().all_reduce(*args, **more))

    def stop(self):
        self.barrier()  # and so does not leave without the others
        super().stop()


class Clings:
    def __init__(self, work):
        self.work = work

    def wait(self):
        try:
            self.work.wait()
        except RuntimeError:
            time.sleep(3600)


class Queued(TorchComm):
    def all_reduce(self, *args, **more):
        try:
            return Goes(super().all_reduce(*args, **more))
        except RuntimeError as error:
            stuck.append(str(error))
            return Goes(None)


class Goes:
    def __init__(self, work):
        self.work = work

    def wait(self):
        try:
            if self.work:
                self.work.wait()
        except RuntimeError as error:
            stuck.append(str(error))


def on_audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and "/checkpoints/" in str(arguments[0]):
        strike("save")


if PHASE == "save":
    sys.addaudithook(on_audit)


@hookimpl
def picotron_backends():
    for op, kernel in (("norm", norm), ("optimizer", optimizer)):
        yield Backend(
            op=op,
            name="faults",
            level=Level.SPECIALIZED,
            load=lambda kernel=kernel: kernel,
            supports=lambda request: (),
        )
    for name, transport in (("clinging", Clinging), ("queued", Queued)):
        yield Backend(
            op="comm",
            name=name,
            level=Level.REFERENCE,
            load=lambda transport=transport: transport("gloo"),
            supports=lambda request: (),
        )
