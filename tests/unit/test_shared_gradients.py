"""Parameters that several ranks hold: their copies get the same gradient, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from picotron_core.parallel.data import Replicas
from picotron_core.parallel.flat import Shared, buckets_of
from picotron_core.parallel.mesh import Axis
from picotron_core.parallel.zero1 import Shards

DP, V, E = 3, 7, 5
CPU = torch.device("cpu")


@dataclass
class Ring:
    """Collectives among threads that add up as a ring does: where in the tensor a number stands
    decides with which rank its sum begins, and so how it is rounded.
    """

    ranks: int
    given: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.ranks)

    def sums(self, index: int, tensor: Tensor) -> list[Tensor]:
        self.given[index] = tensor.clone()
        self.barrier.wait()
        parts = [self.given[rank].tensor_split(self.ranks) for rank in range(self.ranks)]
        found = []
        for first in range(self.ranks):
            total = parts[first][first].clone()
            for step in range(1, self.ranks):
                total += parts[(first + step) % self.ranks][first]
            found.append(total)
        self.barrier.wait()
        return found

    def axis(self, name: str, index: int) -> Axis:
        done = SimpleNamespace(wait=lambda: None)

        def all_reduce(tensor, *, op, group, async_op):
            tensor.copy_(torch.cat(self.sums(index, tensor)))
            return done

        def reduce_scatter(output, tensor, *, group, async_op):
            output.copy_(self.sums(index, tensor)[index])
            return done

        def broadcast(tensor, *, src, group):
            self.given[index] = tensor.clone()
            self.barrier.wait()
            tensor.copy_(self.given[src])
            self.barrier.wait()
            return done

        comm = SimpleNamespace(
            all_reduce=all_reduce, reduce_scatter_tensor=reduce_scatter, broadcast=broadcast
        )
        return Axis(name=name, ranks=tuple(range(self.ranks)), index=index, comm=comm)


class Stage(nn.Module):
    """A tied embedding, and so much else that it stands somewhere else on each end."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self.others = nn.ParameterList(nn.Parameter(torch.ones(3)) for _ in range(others))
        self.embedding = nn.Parameter(torch.ones(V, E))

    def reads(self) -> dict[nn.Module, list[str]]:
        return {self: [name for name, _ in self.named_parameters()]}


@pytest.mark.parametrize("kind", [Replicas, Shards])
def test_both_ends_get_the_same_gradient_of_a_tied_embedding(kind):
    rings = [Ring(DP), Ring(DP)]
    ends = [Ring(2) for _ in range(DP)]

    def rank(end: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(10 * end + index)
        gradient = torch.randn(V, E, generator=generator)
        model = Stage(others=1 + 3 * end)
        shared = [Shared(axis=ends[index].axis("ends", end), names=["embedding"])]
        data = rings[end].axis("dp", index)
        weights = kind(
            model, device=CPU, dtype=torch.float32, axis=data, capacity=100, shared=shared
        )
        loss = (model.embedding * gradient).sum() + sum(other.sum() for other in model.others)
        loss.backward()
        return gradient, weights.gradients()

    places = [(end, index) for end in range(2) for index in range(DP)]
    with ThreadPoolExecutor(len(places)) as pool:
        every = list(pool.map(lambda place: rank(*place), places))
    found = [mine["embedding"].flatten() for _, mine in every if "embedding" in mine]
    if kind is Shards:
        found = [torch.cat(found[:DP]), torch.cat(found[DP:])]
    exact = sum(gradient.double() for gradient, _ in every).flatten()
    for gradient in found:
        assert torch.equal(gradient, found[0])
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-6)
    for _, mine in every:
        for name in mine.keys() - {"embedding"}:
            assert torch.equal(mine[name], torch.full_like(mine[name], DP))


@pytest.mark.parametrize("kind", [Replicas, Shards])
def test_copies_of_a_norm_get_the_gradient_of_the_first(kind):
    """Their kernels may differ in the last bits: by the card, or by the order of atomic sums."""
    tps, dps = [Ring(2), Ring(2)], [Ring(2), Ring(2)]

    def rank(dp: int, tp: int) -> Tensor:
        model = Stage(others=1)
        shared = [Shared(axis=tps[dp].axis("tp", tp), names=["others.0"], copied=True)]
        data = dps[tp].axis("dp", dp)
        weights = kind(
            model, device=CPU, dtype=torch.float32, axis=data, capacity=100, shared=shared
        )
        noise = 1 + tp * 2**-20
        (model.embedding.sum() + noise * (1 + dp) * model.others[0].sum()).backward()
        return weights.gradients().get("others.0", torch.empty(0))

    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    with ThreadPoolExecutor(len(places)) as pool:
        found = list(pool.map(lambda place: rank(*place), places))
    for gradient in found:
        assert torch.equal(gradient, torch.full_like(gradient, 3.0))
    assert sum(map(len, found)) == (6 if kind is Shards else 12)


def test_shared_parameters_have_buckets_of_their_own_behind_the_others():
    tp, end = Ring(2).axis("tp", 0), Ring(2).axis("ends", 0)
    sizes = {"embedding": 10, "norm1": 2, "linear1": 6, "norm2": 2, "linear2": 6, "norm3": 2}
    ends = Shared(axis=end, names=["embedding"])
    norms = Shared(axis=tp, names=["norm1", "norm2", "norm3"])
    shared = [ends, norms]
    for capacity, first in ((12, [["linear2", "linear1"]]), (0, [["linear2"], ["linear1"]])):
        buckets = buckets_of(sizes, capacity=capacity, multiple=4, shared=shared)
        assert [list(bucket.spans) for bucket in buckets] == [
            *first,
            ["embedding"],
            ["norm1", "norm2", "norm3"],
        ]
        assert [bucket.size for bucket in buckets[-2:]] == [12, 8]
        assert [bucket.shared for bucket in buckets[-2:]] == shared
        assert buckets[-1].spans["norm3"] == (4, 6)
