"""Data parallelism: every rank has all weights and its share of the batch.

    backward of the last micro-batch      ... | layer 2 | layer 1 | embedding |
    all_reduce(sum) over dp and cp                  | bucket 0 | bucket 1 | bucket 2 |
                                                                              | update

The gradients of a bucket are summed over the ranks while backward computes the next one's (Li et
al. 2020, arXiv:2006.15704, section 3.2), once an optimizer step, however many micro-batches it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from picotron_core.model.init import Values, put
from picotron_core.ops.comm import Work
from picotron_core.parallel.flat import Gradients, Shared, buckets_of
from picotron_core.parallel.mesh import Axis


class Weights(Protocol):
    """The float32 truth behind a model's parameters, or this rank's part of it.

    masters: name -> float32 tensor that this rank updates; a parameter of which it has no part is
        missing. Everything below goes by the same names and shapes.
    """

    masters: dict[str, Tensor]

    def expect(self, *, last: bool) -> None:
        """Say before a backward whether it is the optimizer step's last."""

    def gradients(self) -> dict[str, Tensor]:
        """After the last backward: the sums over all micro-batches and ranks of the data axis.

        Raises: RunError for a parameter that got none.
        """

    def drop_gradients(self) -> None:
        """Forget them, and give their memory back."""

    @property
    def counts(self) -> bool:
        """Whether this rank's gradients belong in a sum over the data axis: one of the ranks that
        have the same does.
        """

    def publish(self) -> None:
        """Write the masters into the model's parameters, in their dtype."""

    def wait(self) -> None:
        """Until what `publish` set on its way is there."""

    @property
    def divided(self) -> bool:
        """Whether each rank of the data axis has other masters; else all have the same."""

    def span(self, name: str) -> tuple[int, int]:
        """Which numbers of the flat parameter its master holds: first, and one past the last."""


class Replicas:
    """All of the weights, on every rank of `axis`.

    reduce: what gradients travel in; float32 keeps every bit.
    capacity: numbers in a bucket.
    shared: parameters that ranks of another axis have as well.
    values: what the parameters begin with, this rank's part of each, asked for one by one; None is
        what the model holds.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        axis: Axis,
        values: Values | None = None,
        reduce: torch.dtype = torch.float32,
        capacity: int = 0,
        shared: Sequence[Shared] = (),
    ) -> None:
        self.axis = axis
        self.reduce = reduce if axis.size > 1 else torch.float32  # alone, nothing travels
        held = dict(model.named_parameters())
        value_of = values or held.__getitem__
        self.masters: dict[str, Tensor] = {
            name: value_of(name).detach().to(device, torch.float32, copy=True) for name in held
        }
        put(model, {name: master.to(dtype) for name, master in self.masters.items()})
        self.parameters = dict(model.named_parameters())
        if dtype == torch.float32:
            self.masters = dict(self.parameters)
        self.buckets = buckets_of(
            {name: master.numel() for name, master in self.masters.items()},
            capacity=capacity if axis.size > 1 else 0,
            multiple=axis.size,
            shared=shared,
        )
        self._gradients = Gradients(self.parameters, self.buckets, self._sum_over_ranks)
        self._on_their_way: list[tuple[Work, Tensor]] = []

    def expect(self, *, last: bool) -> None:
        self._gradients.last = last

    def _sum_over_ranks(self, _: int, buffer: Tensor) -> None:
        sent = buffer.to(self.reduce)  # float32: the buffer itself
        # in backward: all_reduce(sum) over dp and cp
        self._on_their_way.append((self.axis.all_reduce(sent, async_op=True), sent))

    def gradients(self) -> dict[str, Tensor]:
        self._gradients.finish()
        found: dict[str, Tensor] = {}
        assert len(self._on_their_way) == len(self.buckets)
        for bucket in self.buckets:
            work, sent = self._on_their_way.pop(0)
            work.wait()
            buffer = sent.float()  # as it was sent, it goes
            if bucket.shared:
                bucket.shared.agree(buffer)
            for name, (start, stop) in bucket.spans.items():
                found[name] = buffer[start:stop].view(self.masters[name].shape)
        return {name: found[name] for name in self.masters}

    def drop_gradients(self) -> None:
        self._on_their_way = []
        self._gradients.drop()

    @property
    def counts(self) -> bool:
        return self.axis.is_first

    @torch.no_grad()
    def publish(self) -> None:
        low = [name for name, p in self.parameters.items() if p is not self.masters[name]]
        if low:
            targets: list[Tensor] = [self.parameters[name] for name in low]
            torch._foreach_copy_(targets, [self.masters[name] for name in low])

    def wait(self) -> None:
        return None

    @property
    def divided(self) -> bool:
        return False

    def span(self, name: str) -> tuple[int, int]:
        return 0, self.masters[name].numel()
