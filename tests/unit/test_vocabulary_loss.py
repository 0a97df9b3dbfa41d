"""The loss of a vocabulary that ranks divide, against the loss of the whole in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from picotron_core.parallel import vocabulary
from picotron_core.parallel.mesh import Axis
from picotron_core.parallel.vocabulary import parallel_loss

N, E, V = 11, 6, 7


def ranks(size):
    """Axes of as many threads, and what each asked for and waited for, in its order."""
    given, barrier, events = {}, Barrier(size), [[] for _ in range(size)]

    def axis(index):
        def all_gather(output, tensor, *, group, async_op):
            number = events[index].count("begun")
            events[index].append("begun")
            given[index, number] = tensor

            def wait():
                barrier.wait()
                output.copy_(torch.cat([given[rank, number] for rank in range(size)]))
                events[index].append("waited")

            return SimpleNamespace(wait=wait)

        comm = SimpleNamespace(all_gather_into_tensor=all_gather)
        return Axis(name="tp", ranks=tuple(range(size)), index=index, comm=comm)

    return [axis(index) for index in range(size)], events


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rows", [N, 3, 1])
def test_its_parts_add_up_to_the_whole(monkeypatch, size, rows):
    part = -(-V // size)
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", rows * part)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(N, E, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::4] = -100
    exact = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum", ignore_index=-100)
    (3 * wanted).backward()

    padded = torch.cat((weight, weight.new_full((size * part - V, E), torch.nan)))
    axes, events = ranks(size)

    def rank(axis):
        mine = padded[axis.index * part :][:part].nan_to_num().requires_grad_()
        own = hidden.clone().requires_grad_()
        loss = parallel_loss(axis, V)(own, mine, targets, ignore_index=-100)
        (3 * loss).backward()
        return loss, own.grad, mine.grad

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(rank, axes))
    for loss, _, _ in found:
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(grad for _, grad, _ in found), exact[0].grad)
    torch.testing.assert_close(torch.cat([grad for *_, grad in found])[:V], exact[1].grad)
    count = -(-N // rows)  # of the chunks, each is waited for only once the next has begun
    for order in events:
        assert order == ["begun", *["begun", "waited"] * (count - 1), "waited"]
