"""Parameters laid out in flat buckets, in the order in which backward reaches them.

One collective over 25 MB costs less than a hundred over as much in all; and the first bucket is on
its way while backward still computes the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import proxy

import torch
from torch import Tensor, nn

from picotron_core.errors import RunError
from picotron_core.parallel.mesh import Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Parameters that all ranks of another axis have, each with a part of their gradients; or
    `copied`, each with all of it: then the first one's is everybody's. On cards of two kinds, or by
    a kernel that adds up in any order, they differ in their last bits, and the weights would drift.
    """

    axis: Axis
    names: Collection[str]
    copied: bool = False

    def agree(self, gradient: Tensor) -> None:
        """In place, once a step, when the sum over the data axis is done.

        The buckets of all ranks are alike, and so are the orders of their sums: what they add up is
        the same on all of them, bit for bit, and copies stay copies.
        """
        if self.copied:
            self.axis.broadcast(gradient, 0)  # broadcast over tp
        else:
            self.axis.all_reduce(gradient)  # all_reduce(sum) over ends, or tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """spans: parameter -> its numbers [start, stop) in the bucket. size: of the bucket, padded."""

    spans: Mapping[str, tuple[int, int]]
    size: int
    shared: Shared | None = None


def buckets_of(
    sizes: Mapping[str, int],
    *,
    capacity: int,
    multiple: int = 1,
    shared: Sequence[Shared] = (),
) -> tuple[Bucket, ...]:
    """Fill buckets from the last parameter to the first.

    Args:
        sizes: numbers in each parameter, in the order of forward.
        capacity: numbers that a bucket may hold; a larger parameter has one of its own, and with 0
            every parameter has.
        multiple: of ranks: a bucket is padded to be cut into as many equal parts.
        shared: those of each have a bucket to themselves, behind all others.
    """
    elsewhere = {name for some in shared for name in some.names}
    buckets: list[Bucket] = []
    names: list[str] = []
    for name in reversed([name for name in sizes if name not in elsewhere]):
        if names and sum(sizes[n] for n in (*names, name)) > capacity:
            buckets.append(_bucket(names, sizes, multiple))
            names = []
        names.append(name)
    if names:
        buckets.append(_bucket(names, sizes, multiple))
    for some in shared:
        names = [name for name in sizes if name in some.names]
        if names:
            buckets.append(_bucket(names, sizes, multiple, some))
    return tuple(buckets)


def _bucket(
    names: Sequence[str], sizes: Mapping[str, int], multiple: int, shared: Shared | None = None
) -> Bucket:
    ends = list(accumulate(sizes[name] for name in names))
    spans = {n: (end - sizes[n], end) for n, end in zip(names, ends, strict=True)}
    return Bucket(spans=spans, size=-(-ends[-1] // multiple) * multiple, shared=shared)


class Gradients:
    """Adds up gradients in flat float32 buffers, and hands each on as soon as it is complete.

    A 16-bit sum over micro-batches would lose the small ones. Buffers are made when their first
    gradient comes: until then the memory is the activations'.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buckets: tuple[Bucket, ...],
        on_full: Callable[[int, Tensor], None],
    ) -> None:
        """on_full: gets a bucket's number and its buffer, in the order of the buckets on every
        rank, since collectives must be: a bucket that is full early waits for those before it.
        """
        self.last = True  # the window's last micro-batch: hand on what is complete
        self._buckets = buckets
        self._on_full = on_full
        self.drop()
        for number, bucket in enumerate(buckets):
            for name in bucket.spans:
                parameters[name].register_post_accumulate_grad_hook(self._hook(name, number))  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """Forget everything of this window."""
        self._buffers: list[Tensor | None] = [None] * len(self._buckets)
        self._missing = [set(bucket.spans) for bucket in self._buckets]
        self._next = 0

    def finish(self) -> None:
        """After the last backward.

        Raises: RunError for a parameter whose gradient did not come.
        """
        for missing in self._missing:
            for name in missing:
                raise RunError(
                    f"{name} got no gradient: a backend's backward lost it. Train with "
                    "--backends naive-math, and prove the backends in use with the conformance "
                    "suite."
                )

    def _hook(self, name: str, number: int) -> Callable[[Tensor], None]:
        bucket = self._buckets[number]
        start, stop = bucket.spans[name]
        # Python does not see through the tensor that keeps the hook: if that kept the parameters in
        # turn, by way of `_on_full`, none of them would ever be freed.
        mine = proxy(self)

        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            buffer = mine._buffers[number]
            if buffer is None and stop - start == bucket.size:
                mine._buffers[number] = gradient.reshape(-1).float()  # nothing to add it to
            else:
                if buffer is None:
                    buffer = torch.zeros(bucket.size, dtype=torch.float32, device=gradient.device)
                    mine._buffers[number] = buffer
                buffer[start:stop].view(gradient.shape).add_(gradient)
            if mine.last:
                mine._missing[number].discard(name)
                mine._hand_on()

        return take

    def _hand_on(self) -> None:
        while self._next < len(self._buckets) and not self._missing[self._next]:
            buffer, self._buffers[self._next] = self._buffers[self._next], None
            assert buffer is not None
            self._on_full(self._next, buffer)
            self._next += 1
