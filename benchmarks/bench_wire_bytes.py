"""What gloo really sends: bytes over the loopback for each collective, beside what it must send.

    python benchmarks/bench_wire_bytes.py [--ranks 4]

The kernel counts the bytes of all programs on the loopback: run it where nothing else uses it, or
in a network namespace of its own (`unshare -rn`, then `ip link set lo up`).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed import FileStore

from picotron_core.ops import Comm
from picotron_core.parallel.network import on_loopback
from picotron_core.parallel.private_folder import private_folder
from picotron_core.parallel.traffic import bytes_sent
from picotron_core.registry.plugins import load_registry

NUMBERS, TIMES = 1_000_000, 5


def on_the_loopback() -> int:
    """Bytes since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[1])


def call(comm: Comm, op: str, small: torch.Tensor, large: torch.Tensor) -> None:
    if op == "all_reduce":
        comm.all_reduce(large)
    elif op == "reduce_scatter":
        comm.reduce_scatter_tensor(small, large)
    else:
        comm.all_gather_into_tensor(large, small)


def measure(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    candidates = load_registry().candidates
    comm = next(c for c in candidates if c.backend.name == "gloo-cpu").backend.load()
    os.environ.update(on_loopback())
    store = FileStore(f"{folder}/store", ranks)
    cpu = torch.device("cpu")
    comm.start(store=store, rank=rank, world_size=ranks, device=cpu, timeout_s=60)
    small, large = torch.zeros(NUMBERS), torch.zeros(ranks * NUMBERS)
    for op in ("all_reduce", "reduce_scatter", "all_gather"):
        comm.barrier()
        before = on_the_loopback()
        for _ in range(TIMES):
            call(comm, op, small, large)
        comm.barrier()
        sent = (on_the_loopback() - before) / TIMES / ranks / 1e6
        if rank == 0:
            least = bytes_sent(op, large.nbytes, ranks) / 1e6
            print(f"{op:15} {sent:7.2f} MB sent by each of {ranks} ranks; it must be {least:.2f}")
    comm.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    ranks = parser.parse_args().ranks
    with private_folder() as folder:
        mp.spawn(measure, args=(ranks, str(folder.path)), nprocs=ranks)
