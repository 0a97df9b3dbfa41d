"""ZeRO stage 1: every rank has all weights to compute with, and a part of what updates them.

    backward                       ... | layer 2 | layer 1 | embedding |
    reduce_scatter over dp and cp            | bucket 0 | bucket 1 | bucket 2 |
    update of this rank's part                                                | update |
    all_gather over dp and cp                                          | bucket 2 | bucket 1 | ...
    next forward                                                           | embedding | layer 1 ...

The float32 masters and AdamW's moments, 12 bytes a parameter where it computes in 16 bits, are
divided among the ranks, and the traffic stays that of an all_reduce, which is a reduce_scatter and
an all_gather (Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.1 and 7.2.1). Each flat bucket
is cut into equal parts, wherever that falls within a parameter: AdamW takes every number for
itself, so no rank has more than others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from picotron_core.model.init import Values, put
from picotron_core.model.llama import Llama
from picotron_core.ops.comm import Work
from picotron_core.parallel.flat import Bucket, Gradients, Shared, buckets_of
from picotron_core.parallel.mesh import Axis

BUCKETS_IN_FLIGHT = 2  # that wait for their sum: a slow network must not keep all of them


class Shards:
    """This rank's part of the weights; arguments as in `Replicas`."""

    @torch.no_grad()
    def __init__(
        self,
        model: Llama,
        *,
        device: torch.device,
        dtype: torch.dtype,
        axis: Axis,
        values: Values | None = None,
        capacity: int,
        reduce: torch.dtype = torch.float32,
        shared: Sequence[Shared] = (),
    ) -> None:
        self.axis, self.reduce = axis, reduce
        held = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in held.items()}
        sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        self.buckets = buckets_of(sizes, capacity=capacity, multiple=axis.size, shared=shared)
        self._flat: list[Tensor] = []  # the parameters, which are views of it
        self._mine: list[Tensor] = []  # this rank's part of the masters
        found: dict[str, Tensor] = {}
        views: dict[str, Tensor] = {}
        for bucket in self.buckets:
            whole = torch.zeros(bucket.size, dtype=torch.float32, device=device)
            for name, (start, stop) in bucket.spans.items():
                whole[start:stop] = (values or held.__getitem__)(name).flatten()
            flat = whole.to(dtype)
            mine = self._cut(whole) if dtype == torch.float32 else self._cut(whole).clone()
            for name, (start, stop) in bucket.spans.items():
                views[name] = flat[start:stop].view(self.shapes[name])
            found |= self._parts(bucket, mine)
            self._flat.append(flat)
            self._mine.append(mine)
        put(model, views)
        self.masters = {name: found[name] for name in sizes if name in found}
        self.parameters = dict(model.named_parameters())
        self._gradients = Gradients(self.parameters, self.buckets, self._scatter)
        self._on_their_way: list[tuple[Work, Tensor, Tensor]] = []
        self._summed: list[Tensor] = []
        self._coming: dict[int, tuple[Work, Tensor]] = {}
        where = {name: n for n, bucket in enumerate(self.buckets) for name in bucket.spans}
        for module, names in model.reads().items():
            needed = sorted({where[name] for name in names})
            module.register_forward_pre_hook(self._before(needed))

    def _cut(self, flat: Tensor) -> Tensor:
        """This rank's equal part of a bucket."""
        return flat.chunk(self.axis.size)[self.axis.index]

    def _parts(self, bucket: Bucket, mine: Tensor) -> dict[str, Tensor]:
        """By parameter, what this rank's part of a bucket holds of it."""
        first = self.axis.index * len(mine)
        found = {}
        for name, (start, stop) in bucket.spans.items():
            if start < first + len(mine) and stop > first:
                found[name] = mine[max(0, start - first) : stop - first]
        return found

    def expect(self, *, last: bool) -> None:
        self._gradients.last = last

    def _scatter(self, _: int, buffer: Tensor) -> None:
        if len(self._on_their_way) == BUCKETS_IN_FLIGHT:
            self._take()
        sent = buffer.to(self.reduce)  # float32: the buffer itself
        mine = torch.empty_like(self._cut(sent))
        # in backward: reduce_scatter(sum) over dp and cp
        work = self.axis.reduce_scatter(mine, sent, async_op=True)
        self._on_their_way.append((work, mine, sent))

    def _take(self) -> None:
        """Wait for the oldest sum; its whole bucket goes."""
        work, mine, _ = self._on_their_way.pop(0)
        work.wait()
        self._summed.append(mine.float())

    def gradients(self) -> dict[str, Tensor]:
        self._gradients.finish()
        while self._on_their_way:
            self._take()
        found: dict[str, Tensor] = {}
        for bucket, mine in zip(self.buckets, self._summed, strict=True):
            if bucket.shared:
                bucket.shared.agree(mine)
            found |= self._parts(bucket, mine)
        return {name: found[name] for name in self.masters}

    def drop_gradients(self) -> None:
        while self._on_their_way:
            self._take()
        self._summed = []
        self._gradients.drop()

    @property
    def counts(self) -> bool:
        return True  # nobody else has this part

    @torch.no_grad()
    def publish(self) -> None:
        for number in reversed(range(len(self.buckets))):  # as forward will need them
            flat = self._flat[number]
            sent = self._mine[number].to(flat.dtype, copy=True)
            # before the next forward: all_gather over dp and cp
            self._coming[number] = (self.axis.all_gather(flat, sent, async_op=True), sent)

    def wait(self) -> None:
        for work, _ in self._coming.values():
            work.wait()
        self._coming = {}

    def _before(self, needed: list[int]) -> Callable[[nn.Module, Any], None]:
        def wait(_: nn.Module, __: Any) -> None:
            for number in needed:
                if number in self._coming:
                    work, _sent = self._coming.pop(number)  # held until it has arrived
                    work.wait()

        return wait

    @property
    def divided(self) -> bool:
        return True

    def span(self, name: str) -> tuple[int, int]:
        for bucket, mine in zip(self.buckets, self._mine, strict=True):
            if name in bucket.spans:
                start, stop = bucket.spans[name]
                first = self.axis.index * len(mine)
                return max(start, first) - start, min(stop, first + len(mine)) - start
        raise AssertionError(f"{name} is in no bucket")
