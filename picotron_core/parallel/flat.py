"""Parameters laid out in flat buckets, in the order in which backward reaches them.

One collective over 25 MB costs less than a hundred over as much in all; and the first bucket is on
its way while backward still computes the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from weakref import proxy

import torch
from torch import Tensor, nn

from picotron_core.errors import RunError
from picotron_core.parallel.mesh import Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """spans: parameter -> its numbers [start, stop) in the bucket. size: of the bucket, padded."""

    spans: Mapping[str, tuple[int, int]]
    size: int


def buckets_of(sizes: Mapping[str, int], *, capacity: int, multiple: int = 1) -> tuple[Bucket, ...]:
    """Fill buckets from the last parameter to the first.

    Args:
        sizes: numbers in each parameter, in the order of forward.
        capacity: numbers that a bucket may hold; a larger parameter has one of its own, and with 0
            every parameter has.
        multiple: of ranks: a bucket is padded to be cut into as many equal parts.
    """
    buckets: list[Bucket] = []
    spans: dict[str, tuple[int, int]] = {}
    end = 0

    def close() -> None:
        buckets.append(Bucket(spans=dict(spans), size=-(-end // multiple) * multiple))
        spans.clear()

    for name, size in reversed(list(sizes.items())):
        if spans and end + size > capacity:
            close()
            end = 0
        spans[name] = (end, end + size)
        end += size
    if spans:
        close()
    return tuple(buckets)


def sizes_in_order(tensors: Mapping[str, Tensor], shared: Collection[str]) -> dict[str, int]:
    """Numbers in each parameter; first, and so in the last bucket, those that come last."""
    names = [*(n for n in tensors if n in shared), *(n for n in tensors if n not in shared)]
    return {name: tensors[name].numel() for name in names}


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
        shared: Mapping[str, Axis],
    ) -> None:
        """shared: parameters that other ranks of an axis have as well, with gradients of their own
        to be added: at the end, for those ranks are not done at the same time.

        on_full: gets a bucket's number and its buffer, in the order of the buckets on every
        rank, since collectives must be: a bucket that is full early waits for those before it.
        """
        self.last = True  # the window's last micro-batch: hand on what is complete
        self._buckets = buckets
        self._on_full = on_full
        self._shared = shared
        self.drop()
        for number, bucket in enumerate(buckets):
            for name in bucket.spans:
                parameters[name].register_post_accumulate_grad_hook(self._hook(name, number))  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """Forget everything of this window."""
        self._buffers: list[Tensor | None] = [None] * len(self._buckets)
        self._missing = [set(bucket.spans) for bucket in self._buckets]
        self._came: set[str] = set()  # of the shared ones
        self._next = 0

    def finish(self) -> None:
        """After the last backward.

        Raises: RunError for a parameter whose gradient did not come.
        """
        self._add_shared()
        self._hand_on()
        for missing in self._missing:
            for name in missing:
                raise RunError(
                    f"{name} got no gradient: a backend's backward lost it. Train with "
                    "--backends naive-math, and prove the backends in use with the conformance "
                    "suite."
                )

    def _add_shared(self) -> None:
        for number, bucket in enumerate(self._buckets):
            for name in self._shared.keys() & bucket.spans.keys() & self._came:
                start, stop = bucket.spans[name]
                buffer = self._buffers[number]
                assert buffer is not None
                # at the end of a step: all_reduce(sum) over the first and the last stage
                self._shared[name].all_reduce(buffer[start:stop])
                self._missing[number].discard(name)

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
            if buffer is None and gradient.dtype == torch.float32 and stop - start == bucket.size:
                mine._buffers[number] = gradient.reshape(-1)  # nothing to add it to
            else:
                if buffer is None:
                    buffer = torch.zeros(bucket.size, dtype=torch.float32, device=gradient.device)
                    mine._buffers[number] = buffer
                buffer[start:stop].view(gradient.shape).add_(gradient)
            if mine.last and name in mine._shared:
                mine._came.add(name)
            elif mine.last:
                mine._missing[number].discard(name)
                mine._hand_on()

        return take

    def _hand_on(self) -> None:
        while self._next < len(self._buckets) and not self._missing[self._next]:
            buffer, self._buffers[self._next] = self._buffers[self._next], None
            assert buffer is not None
            self._on_full(self._next, buffer)
            self._next += 1
