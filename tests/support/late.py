"""A `comm` among threads that does what it is asked for as late as a transport may: in `wait()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import Any
from weakref import ref

import torch
from torch import Tensor

PATIENCE_S = 60.0


class Board:
    """What ranks have put down for each other. error: of the first that failed."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._said: dict[Any, Tensor] = {}
        self._changed = Condition()

    def put(self, key: Any, tensor: Tensor) -> None:
        with self._changed:
            self._said[key] = tensor.detach().clone()
            self._changed.notify_all()

    def get(self, key: Any) -> Tensor:
        with self._changed:
            self._changed.wait_for(lambda: key in self._said or self.error, PATIENCE_S)
            return self._said[key]

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()


class Lent:
    """Memory that the transport has: nobody changes it, and nobody lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        # Weakly: to hold it is the business of whoever asked.
        self._tensor, self._copy = ref(tensor), tensor.detach().clone()

    def back(self, what: object) -> Tensor:
        tensor = self._tensor()
        assert tensor is not None, f"{what}: its memory was let go of before it was waited for"
        as_it_was = torch.allclose(tensor, self._copy, rtol=0, atol=0, equal_nan=True)
        assert as_it_was, f"{what}: its memory was changed before it was waited for"
        return tensor


@dataclass(eq=False, kw_only=True)
class Asked:
    """A call of a rank. gets: what it writes, once all others are there."""

    comm: LateComm
    name: tuple[str, int]
    noted: bool
    reads: Lent | None
    writes: Lent | None
    gets: Callable[[], Tensor]

    @torch.no_grad()
    def wait(self) -> None:
        if self not in self.comm.open:
            return
        self.comm.open.remove(self)
        if self.noted:
            self.comm.events.append(("waited", *self.name))
        if self.reads:
            self.reads.back(self.name)
        if self.writes:
            self.writes.back(self.name).copy_(self.gets())


@dataclass(kw_only=True)
class LateComm:
    """One rank's of `size`.

    What an asynchronous call reads must stay as it is until it is waited for; what it writes is NaN
    until then, and must stay so.

    late: without, all is done at once.
    open: what was not waited for.
    events: ("asked" or "waited", op, number) of each asynchronous call, and what tests add.
    """

    board: Board
    rank: int
    size: int
    late: bool = True
    open: list[Asked] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    _counts: Counter[Any] = field(default_factory=Counter)

    def new_group(self, ranks):
        return self._next("groups"), tuple(ranks)

    def all_reduce(self, tensor, *, op="sum", group=None, async_op=False):
        every = self._exchange(group, tensor)
        gets = lambda: every().sum(0) if op == "sum" else every().amax(0)  # noqa: E731
        return self._ask("all_reduce", None, tensor, gets, async_op)

    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        every, shape = self._exchange(group, tensor), output.shape
        return self._ask("all_gather", tensor, output, lambda: every().view(shape), async_op)

    def reduce_scatter_tensor(self, output, tensor, *, group=None, async_op=False):
        every, place = self._exchange(group, tensor), self._ranks(group).index(self.rank)
        shape = (-1, *output.shape)
        gets = lambda: every().sum(0).view(shape)[place]  # noqa: E731
        return self._ask("reduce_scatter", tensor, output, gets, async_op)

    def broadcast(self, tensor, *, src, group=None, async_op=False):
        every, place = self._exchange(group, tensor), self._ranks(group).index(src)
        return self._ask("broadcast", None, tensor, lambda: every()[place], async_op)

    def send(self, tensor, *, dst, group=None, async_op=False):
        """Delivered at once, or ranks that wait before they receive would wait for ever."""
        self.board.put(self._message(self.rank, dst, group), tensor)
        return self._ask("send", tensor, None, None, async_op)

    def recv(self, tensor, *, src, group=None, async_op=False):
        key = self._message(src, self.rank, group)
        return self._ask("recv", None, tensor, lambda: self.board.get(key), async_op)

    def _ranks(self, group):
        return group[1] if group else tuple(range(self.size))

    def _next(self, counted):
        self._counts[counted] += 1
        return self._counts[counted] - 1

    def _message(self, *where):
        return *where, self._next(where)

    def _exchange(self, group, tensor):
        """Put a tensor down as it is now; returns what gets those of all, stacked."""
        number, ranks = self._next(group), self._ranks(group)
        self.board.put((group, number, self.rank), tensor)
        return lambda: torch.stack([self.board.get((group, number, rank)) for rank in ranks])

    def _ask(self, op, reads, writes, gets, async_op):
        later = async_op and self.late
        read = None if reads is None else Lent(reads)  # before: it may not be what is written
        if later and writes is not None:
            writes.fill_(torch.nan)
        asked = Asked(
            comm=self,
            name=(op, self._next((op, async_op))),
            noted=async_op,
            reads=read,
            writes=None if writes is None else Lent(writes),
            gets=gets,
        )
        self.open.append(asked)
        if async_op:
            self.events.append(("asked", *asked.name))
        if not later:
            asked.wait()
        return asked


def among_threads(ranks: int, work: Callable[[LateComm], Any], *, late: bool = True) -> list[Any]:
    """What `work` returned on each rank, which has waited for all that it asked for.

    Raises: the error of the rank that failed first.
    """
    board = Board()

    def rank(number: int) -> Any:
        comm = LateComm(board=board, rank=number, size=ranks, late=late)
        try:
            found = work(comm)
            assert [asked.name for asked in comm.open] == [], "never waited for"
            return found
        except BaseException as error:  # noqa: BLE001 - raised below, once all have left
            board.fail(error)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(rank, range(ranks)))
    if board.error:
        raise board.error
    return found
