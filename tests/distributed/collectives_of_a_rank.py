"""What every rank of test_comm.py does: each collective on integers, compared bit for bit.

Run with torchrun's variables; prints "ok" once all of it held.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from picotron_core.parallel.world import join
from picotron_core.registry.plugins import load_registry

DTYPES = (torch.float32, torch.int64, torch.bfloat16)
SIZES = ((1,), (7,), (3, 5), (1000,))


def payload(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small integers that differ by rank and place: sums of them are exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * (rank + 2) + rank) % 11).reshape(shape).to(dtype)


def equal(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert torch.equal(found, wanted), f"{what}: {found} is not {wanted}"


def reductions(comm: Any, ranks: list[int], rank: int, group: Any) -> None:
    fold = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}
    for dtype in DTYPES:
        for shape in SIZES:
            parts = torch.stack([payload(r, shape, dtype) for r in ranks])
            for op, reduce in fold.items():
                wanted = reduce(parts, dim=0).to(dtype)
                tensor = payload(rank, shape, dtype)
                comm.all_reduce(tensor, op=op, group=group).wait()
                equal(tensor, wanted, f"all_reduce {op} {dtype} {shape}")
            whole = torch.empty((len(ranks) * shape[0], *shape[1:]), dtype=dtype)
            mine = payload(rank, shape, dtype)
            comm.all_gather_into_tensor(whole, mine, group=group)
            equal(whole, parts.flatten(0, 1), f"all_gather {dtype} {shape}")
            full = (len(ranks) * shape[0], *shape[1:])
            total = torch.stack([payload(r, full, dtype) for r in ranks]).sum(0).to(dtype)
            shard = torch.empty(shape, dtype=dtype)
            comm.reduce_scatter_tensor(shard, payload(rank, full, dtype), group=group)
            place = ranks.index(rank) * shape[0]
            equal(shard, total[place : place + shape[0]], f"reduce_scatter {dtype} {shape}")
            for src in ranks:
                tensor = payload(rank, shape, dtype)
                comm.broadcast(tensor, src=src, group=group)
                equal(tensor, payload(src, shape, dtype), f"broadcast from {src}")


def in_flight(comm: Any, rank: int, size: int) -> None:
    """Many at once, waited for in another order than they were started."""
    tensors = [payload(rank, (n + 1,), torch.float32) for n in range(20)]
    works = [comm.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    for n, tensor in enumerate(tensors):
        wanted = sum(payload(r, (n + 1,), torch.float32) for r in range(size))
        equal(tensor, wanted, f"async all_reduce {n}")


def ring(comm: Any, rank: int, size: int) -> None:
    """Each sends to the next and hears from the one before: only async sends cannot deadlock."""
    heard = torch.empty(7, dtype=torch.int64)
    sent = comm.send(payload(rank, (7,), torch.int64), dst=(rank + 1) % size, async_op=True)
    comm.recv(heard, src=(rank - 1) % size)
    sent.wait()
    equal(heard, payload((rank - 1) % size, (7,), torch.int64), "ring")


def main() -> None:
    world = join(timeout_s=60)
    comm = next(
        candidate.backend.load()
        for candidate in load_registry().candidates
        if candidate.backend.name == sys.argv[1]
    )
    comm.start(
        store=world.store,
        rank=world.rank,
        world_size=world.size,
        device=torch.device("cpu"),
        timeout_s=60,
    )
    everyone = list(range(world.size))
    reductions(comm, everyone, world.rank, None)
    in_flight(comm, world.rank, world.size)
    if world.size > 1:
        ring(comm, world.rank, world.size)
    odd = [rank for rank in everyone if rank != 1]
    group = comm.new_group(odd)  # every rank makes it, rank 1 is not in it
    if world.rank in odd:
        reductions(comm, odd, world.rank, group)
    comm.barrier()
    for whole, shard in ((torch.empty(5), torch.empty(3)), (torch.empty(4).int(), torch.empty(4))):
        try:
            comm.all_gather_into_tensor(whole, shard)
        except ValueError:
            continue
        raise AssertionError("sizes or dtypes that do not fit were taken")
    comm.stop()
    comm.stop()
    print("ok")


if __name__ == "__main__":
    main()
