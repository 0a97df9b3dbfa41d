"""One rank of `test_comm.py`: makes the checks of the comm contract and prints their names.

python comm_checks.py BACKEND FUNCTION FOLDER, with RANK and WORLD_SIZE in the environment.
"""

import os
import sys

import pytest
import torch
import torch.distributed

from picotron_core.registry.plugins import load_registry


def payload(rank, n=5, dtype=torch.int64):
    """Integers that tell rank and place apart; sums of them are exact in every dtype used."""
    return (torch.arange(n) * 3 + rank * 17 - 4).to(dtype)


def total(world, n=5, dtype=torch.int64):
    return sum(payload(rank, n) for rank in range(world)).to(dtype)


def expect(found, wanted):
    assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
    assert torch.equal(found, wanted), (found, wanted)


def all_reduce(comm, rank, world):
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16):
        for n in (0, 1, 7, 1025 if dtype.itemsize > 2 else 8):  # bfloat16: integers up to 256
            tensor = payload(rank, n, dtype)
            comm.all_reduce(tensor).wait()
            expect(tensor, total(world, n, dtype))
    ranks = torch.stack([payload(rank) * (-1) ** rank for rank in range(world)])
    for op, wanted in (("max", ranks.amax(0)), ("min", ranks.amin(0))):
        tensor = ranks[rank].clone()
        comm.all_reduce(tensor, op=op)
        expect(tensor, wanted)
    scalar = torch.tensor(2.0**rank)
    comm.all_reduce(scalar)
    expect(scalar, torch.tensor(2.0**world - 1))


def all_reduce_of_a_leaf(comm, rank, world):
    """Weights are leaves that require a gradient; they change in place all the same."""
    leaf = payload(rank, 3, torch.float32).requires_grad_()
    place = leaf.data_ptr()
    comm.all_reduce(leaf)
    comm.broadcast(leaf, src=world - 1)
    expect(leaf.detach(), total(world, 3, torch.float32))
    assert leaf.data_ptr() == place
    assert leaf.requires_grad


def all_gather(comm, rank, world):
    for shape in ((3,), (2, 3), (1, 1), (0, 2)):
        size = torch.Size(shape).numel()
        mine = payload(rank, size).view(shape)
        output = torch.full((world * shape[0], *shape[1:]), -1)
        comm.all_gather_into_tensor(output, mine)
        expect(output, torch.cat([payload(r, size).view(shape) for r in range(world)]))
        expect(mine, payload(rank, size).view(shape))
    weight = torch.nn.Parameter(payload(rank, 2, torch.float32))
    gathered = torch.empty(world * 2)
    comm.all_gather_into_tensor(gathered, weight)
    assert not gathered.requires_grad


def reduce_scatter(comm, rank, world):
    for tail in ((), (3,)):
        whole_size = torch.Size((world * 2, *tail)).numel()
        whole = payload(rank, whole_size).view(world * 2, *tail)
        kept = whole.clone()
        output = torch.full((2, *tail), -1)
        comm.reduce_scatter_tensor(output, whole)
        expect(output, total(world, whole_size).view(world * 2, *tail)[rank * 2 : rank * 2 + 2])
        expect(whole, kept)
    output = torch.empty(1, dtype=torch.int64)
    comm.reduce_scatter_tensor(output, payload(rank, world), op="max")
    expect(output, payload(world - 1, world)[rank : rank + 1])


def wrong_sizes(comm, rank, world):
    """An error at once and on every rank, before any bytes are on the way."""
    with pytest.raises(ValueError, match="shards"):
        comm.all_gather_into_tensor(torch.empty(world * 2 + 1), torch.empty(2))
    with pytest.raises(ValueError, match="dtypes differ"):
        comm.reduce_scatter_tensor(torch.empty(1), torch.empty(world).double())


def broadcast(comm, rank, world):
    for src in range(world):
        tensor = payload(rank, 9)
        comm.broadcast(tensor, src=src)
        expect(tensor, payload(src, 9))


def asynchronous(comm, rank, world):
    """Several under way at once, of different kinds and sizes, waited for in reverse."""
    reduced = [payload(rank, n) for n in (1, 1025, 3)]
    gathered, scattered = torch.empty(world * 2, dtype=torch.int64), torch.empty(2).long()
    sent = payload(rank, 4)
    works = [comm.all_reduce(tensor, async_op=True) for tensor in reduced]
    works.append(comm.all_gather_into_tensor(gathered, payload(rank, 2), async_op=True))
    works.append(comm.reduce_scatter_tensor(scattered, payload(rank, world * 2), async_op=True))
    works.append(comm.broadcast(sent, src=0, async_op=True))
    for work in reversed(works):
        work.wait()
    for tensor in reduced:
        expect(tensor, total(world, len(tensor)))
    expect(gathered, torch.cat([payload(r, 2) for r in range(world)]))
    expect(scattered, total(world, world * 2)[rank * 2 : rank * 2 + 2])
    expect(sent, payload(0, 4))


def send_and_recv(comm, rank, world):
    """Round the ring, first one after the other, then all at once."""
    for nobody in (rank, world):
        with pytest.raises(ValueError, match="rank"):
            comm.send(payload(0), dst=nobody)
        with pytest.raises(ValueError, match="rank"):
            comm.recv(payload(0), src=nobody)
    if world == 1:
        return
    after, before = (rank + 1) % world, (rank - 1) % world
    got = torch.empty(6, dtype=torch.int64)
    if rank == 0:
        comm.send(payload(0, 6), dst=after).wait()
        comm.recv(got, src=before)
    else:
        comm.recv(got, src=before).wait()
        comm.send(payload(rank, 6), dst=after)
    expect(got, payload(before, 6))
    got = torch.empty(6, dtype=torch.int64)
    works = [
        comm.send(payload(rank, 6) * 2, dst=after, async_op=True),
        comm.recv(got, src=before, async_op=True),
    ]
    for work in works:
        work.wait()
    expect(got, payload(before, 6) * 2)


def subgroups(comm, rank, world):
    """All ranks make all groups; members alone use them, and nobody else hears of it."""
    members = [0] if world == 1 else [0, world - 1]
    groups = [comm.new_group([r]) for r in range(world)] + [comm.new_group(members)]
    alone = payload(rank)
    comm.all_reduce(alone, group=groups[rank])
    expect(alone, payload(rank))
    tensor = payload(rank)
    if rank in members:
        group, place = groups[-1], members.index(rank)
        comm.all_reduce(tensor, group=group)
        expect(tensor, sum(payload(r) for r in members))
        output = torch.empty(2 * len(members), dtype=torch.int64)
        comm.all_gather_into_tensor(output, payload(rank, 2), group=group)
        expect(output, torch.cat([payload(r, 2) for r in members]))
        output = torch.empty(1, dtype=torch.int64)
        comm.reduce_scatter_tensor(output, payload(rank, len(members)), group=group)
        expect(output, sum(payload(r, len(members)) for r in members)[place : place + 1])
        tensor = payload(rank)
        comm.broadcast(tensor, src=members[-1], group=group)  # a global rank
        expect(tensor, payload(members[-1]))
        comm.barrier(group=group)
    else:
        expect(tensor, payload(rank))
    comm.barrier()


CHECKS = (
    all_reduce,
    all_reduce_of_a_leaf,
    all_gather,
    reduce_scatter,
    wrong_sizes,
    broadcast,
    asynchronous,
    send_and_recv,
    subgroups,
)


def start(comm, rank, world, folder, timeout_s):
    store = torch.distributed.FileStore(f"{folder}/store", world)
    comm.start(
        store=store, rank=rank, world_size=world, device=torch.device("cpu"), timeout_s=timeout_s
    )
    return store


def check_everything(comm, rank, world, folder):
    comm.stop()  # nothing was started: no error
    start(comm, rank, world, folder, timeout_s=60)
    for check in CHECKS:
        check(comm, rank, world)
        print(check.__name__)
    comm.stop()


def leave_a_subgroup_waiting(comm, rank, world, folder):
    """Rank 0 waits for a rank that never comes; the run's timeout ends it."""
    store = start(comm, rank, world, folder, timeout_s=4)
    group = comm.new_group([0, 1])
    if rank == 0:
        with pytest.raises(RuntimeError, match="4000ms"):
            comm.all_reduce(payload(0), group=group)
        store.set("over", "")
        print("timed out")
    else:
        store.get("over")  # keeps its end of the connection open till then
    # A group whose collective timed out cannot be left in order: gloo's threads still run, and the
    # interpreter's own end would sometimes abort over them.
    sys.stdout.flush()
    os._exit(0)


def main():
    backend, function, folder = sys.argv[1:]
    torch.set_num_threads(1)
    (comm,) = (
        candidate.backend.load()
        for candidate in load_registry().candidates
        if (candidate.backend.op, candidate.backend.name) == ("comm", backend)
    )
    globals()[function](comm, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder)


if __name__ == "__main__":
    main()
