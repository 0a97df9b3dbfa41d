"""What a save costs training, on a disk of 20 MB/s: a 100 MB state, against a plain torch.save.

    python benchmarks/bench_checkpoint.py

The disk is the real one behind a brake on every write; torch.save writes through the same brake, as
most training scripts do: in the loop. A step is a matrix product of fixed size, so that times tell.
Compare numbers of one run only.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from picotron_backends.one_process import COMM

from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.save import Saver
from picotron_core.engine.state import TrainState
from picotron_core.ops.optimizer import STATES
from picotron_core.parallel.data import Replicas
from picotron_core.parallel.layout import Layout, shapes_of
from picotron_core.parallel.mesh import make_mesh

BYTES, RATE = 100e6, 20e6
STEPS, REPEATS = 60, 5
SHARE = 0.035


class SlowDisk(Disk):
    """RATE bytes a second, over all writes."""

    def write(self, descriptor: int, data: memoryview) -> int:
        end = time.monotonic() + len(data) / RATE
        taken = super().write(descriptor, data)
        time.sleep(max(0.0, end - time.monotonic()))
        return taken


class SlowFile(io.FileIO):
    """The same brake, for torch.save."""

    def write(self, data) -> int:
        end = time.monotonic() + len(data) / RATE
        taken = super().write(data)
        time.sleep(max(0.0, end - time.monotonic()))
        return taken or 0


def state_of(numbers: int) -> TrainState:
    model = torch.nn.Linear(numbers // 1000, 1000, bias=False)
    mesh = make_mesh(COMM, rank=0, world_size=1)
    weights = Replicas(model, device=torch.device("cpu"), dtype=torch.float32, axis=mesh.data)
    masters = weights.masters
    moments = {kind: {n: torch.rand_like(t) for n, t in masters.items()} for kind in STATES}
    layout = Layout(mesh=mesh, shapes=shapes_of(model))
    return TrainState(model=model, weights=weights, layout=layout, moments=moments, step=1)  # type: ignore[arg-type]


def steps_s(step: Callable[[int], None]) -> float:
    begin = time.perf_counter()
    for number in range(STEPS):
        step(number)
    return time.perf_counter() - begin


def resident() -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class Peak(threading.Thread):
    """The most that this process takes while it lasts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = resident(), False
        self.start()

    def run(self) -> None:
        while not self.done:
            self.peak = max(self.peak, resident())
            time.sleep(0.005)


def main() -> int:
    torch.set_num_threads(1)
    state = state_of(int(BYTES / 12))
    a = torch.rand(1400, 1400)

    def compute() -> None:
        torch.mm(a, a)

    facts = Facts(data="", eos_id=0, seed=0, global_batch=1, seq_len=8)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(
            state, Path(folder) / "checkpoints", facts=facts, keep=2, disk=SlowDisk(), saved=0
        )
        before = resident()
        peak = Peak()
        saver.save()
        peak.done = True
        extra = peak.peak - before
        plain, saved, blocked, held, copies = [], [], [], [], []
        for _ in range(REPEATS):
            plain.append(steps_s(lambda _: compute()))

            def with_saver(number: int) -> None:
                compute()
                saver.move_on()
                if number == 0:
                    state.step += 1
                    saver.start()

            held_before = saver.held_s
            saved.append(steps_s(with_saver))
            held.append(saver.held_s - held_before)
            saver.finish()

            def with_torch(number: int) -> None:
                compute()
                if number == 0:
                    with SlowFile(f"{folder}/state.pt", "w") as file:
                        torch.save({"masters": state.masters, "moments": state.moments}, file)

            blocked.append(steps_s(with_torch))
            begin = time.perf_counter()
            for of in (state.masters, *state.moments.values()):
                for tensor in of.values():
                    tensor.clone()
            copies.append(time.perf_counter() - begin)
        open_checkpoint(saver.save())
    run_s = statistics.median(plain)
    delay = statistics.median(b - a for a, b in zip(plain, saved, strict=True))
    usual = statistics.median(b - a for a, b in zip(plain, blocked, strict=True))
    copy_s, held_s = statistics.median(copies), statistics.median(held)
    print(f"state {BYTES / 1e6:.0f} MB, disk {RATE / 1e6:.0f} MB/s, {STEPS} steps: {run_s:.2f} s")
    print(f"torch.save in the loop     {usual:6.2f} s later, {usual / run_s:.1%}")
    print(f"picotron                   {delay:6.2f} s later, {delay / run_s:.1%}")
    print(f"  of which in the saver    {held_s:6.2f} s; one copy of the state takes {copy_s:.2f} s")
    print(f"extra memory               {extra / BYTES:6.2f} x the state")
    limit = max(SHARE * run_s, copy_s)
    print(f"goal: at most {limit:.2f} s later, and 1.05 x: ", end="")
    met = delay <= limit and extra <= 1.05 * BYTES
    print("met" if met else "MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
