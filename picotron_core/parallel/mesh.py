"""The ranks as a grid with the axes dp, pp, cp and tp, and what this rank can say along each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from math import prod
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.distributed import is_available

from picotron_core.errors import ConfigError
from picotron_core.ops import Comm
from picotron_core.ops.comm import Group, ReduceOp, Work
from picotron_core.parallel.watchdog import Watchdog

# The last changes fastest: tp speaks most, so its ranks are neighbours, in one machine if they can
# be; dp speaks once a step, and may cross machines.
AXES = ("dp", "pp", "cp", "tp")

P = ParamSpec("P")


class Done:
    """A collective over one rank: nothing was under way."""

    def wait(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Both:
    one: Work
    other: Work

    def wait(self) -> None:
        self.one.wait()
        self.other.wait()


@dataclass(frozen=True, slots=True)
class Watched:
    """A collective under way, since when, whose failing names the rank that is missing."""

    work: Work
    what: str
    since: float
    watchdog: Watchdog

    def wait(self) -> None:
        with self.watchdog.waiting(self.what, since=self.since):
            self.work.wait()


def _watched(say: Callable[Concatenate[Axis, P], Work]) -> Callable[Concatenate[Axis, P], Work]:
    """Whoever waits in it, or for it, is known to be in "all_reduce over dp"."""

    @wraps(say)
    def watched(axis: Axis, /, *args: P.args, **kwargs: P.kwargs) -> Work:
        what = f"{say.__name__} over {axis.name}"
        since = time.monotonic()
        with axis.watchdog.waiting(what, since=since):
            work = say(axis, *args, **kwargs)
        return Watched(work, what, since, axis.watchdog)

    return watched


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The ranks that this one speaks with along an axis.

    ranks: global ones, in the order of the axis, this one among them. index: this one's place.
    group: of all of them, for collectives.
    lanes: groups of all of them, for messages from a rank of even and of odd index. NCCL does what
        a group is asked for one after the other, and a message that is sent holds up what comes
        after it until it is received: on a ring where each rank first sends and then receives, all
        would wait (tests/unit/test_messages.py).
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    comm: Comm = field(repr=False)
    group: Group = field(default=None, repr=False)
    lanes: tuple[Group, Group] = field(default=(None, None), repr=False)
    watchdog: Watchdog = field(default_factory=Watchdog, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @_watched
    def all_reduce(self, tensor: Tensor, *, op: ReduceOp = "sum", async_op: bool = False) -> Work:
        """In place: tensor <- op over the axis."""
        if self.size == 1:
            return Done()
        return self.comm.all_reduce(tensor, op=op, group=self.group, async_op=async_op)

    @_watched
    def all_gather(self, output: Tensor, tensor: Tensor, *, async_op: bool = False) -> Work:
        """output (size * n, ...) <- the ranks' tensors (n, ...), in the order of the axis."""
        if self.size == 1:
            output.copy_(tensor)
            return Done()
        return self.comm.all_gather_into_tensor(output, tensor, group=self.group, async_op=async_op)

    @_watched
    def reduce_scatter(self, output: Tensor, tensor: Tensor, *, async_op: bool = False) -> Work:
        """output (n, ...) <- this rank's slice of the sum of tensor (size * n, ...)."""
        if self.size == 1:
            output.copy_(tensor)
            return Done()
        return self.comm.reduce_scatter_tensor(output, tensor, group=self.group, async_op=async_op)

    @_watched
    def broadcast(self, tensor: Tensor, index: int) -> Work:
        """In place: tensor <- that of the rank at `index` of the axis."""
        if self.size == 1:
            return Done()
        return self.comm.broadcast(tensor, src=self.ranks[index], group=self.group)

    @_watched
    def pass_on(self, tensor: Tensor, coming: Tensor) -> Work:
        """tensor to the next rank, the first after the last, and coming <- the previous one's.

        In flight until waited for, `tensor` too.
        """
        return Both(self._send(tensor, to=1), self._recv(coming, by=-1, async_op=True))

    @_watched
    def send_to_next(self, tensor: Tensor) -> Work:
        """To the next rank, the first after the last; in flight until waited for."""
        return self._send(tensor, to=1)

    @_watched
    def recv_from_previous(self, tensor: Tensor) -> Work:
        return self._recv(tensor, by=-1)

    @_watched
    def send_to_previous(self, tensor: Tensor) -> Work:
        return self._send(tensor, to=-1)

    @_watched
    def recv_from_next(self, tensor: Tensor) -> Work:
        return self._recv(tensor, by=1)

    def _send(self, tensor: Tensor, *, to: int) -> Work:
        peer, lane = self.ranks[(self.index + to) % self.size], self.lanes[self.index % 2]
        return self.comm.send(tensor, dst=peer, group=lane, async_op=True)

    def _recv(self, tensor: Tensor, *, by: int, async_op: bool = False) -> Work:
        sender = (self.index + by) % self.size
        peer, lane = self.ranks[sender], self.lanes[sender % 2]
        return self.comm.recv(tensor, src=peer, group=lane, async_op=async_op)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This rank's axes, of a world of dp * pp * cp * tp ranks.

    data: dp and cp as one. Both split the tokens of a batch, and every rank of either has the same
        weights: gradients are summed over it.
    back: pp again, by lanes of its own: what comes back must not wait for what goes on.
    ends: the first and the last stage, which share a tied embedding; one rank where pp is 1, and
        on the stages between.
    world: all ranks.
    device_mesh: the axes of more than one rank as torch's `DeviceMesh`, with the groups that the
        comm op made, for code that wants one; None where those are not torch's.
    """

    dp: Axis
    pp: Axis
    cp: Axis
    tp: Axis
    data: Axis
    back: Axis
    ends: Axis
    world: Axis
    device_mesh: object | None = field(default=None, repr=False)


def make_mesh(
    comm: Comm,
    *,
    rank: int,
    world_size: int,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    watchdog: Watchdog | None = None,
) -> Mesh:
    """Lay the ranks out and form the groups; `comm` has started. Every rank calls it alike.

    dp is what the other degrees leave. Rank r is at ((dp * PP + pp) * CP + cp) * TP + tp.

    Args:
        watchdog: told of every wait, and asked about every error.

    Raises: ConfigError where the degrees do not divide the world.
    """
    dp = data_parallel_degree(world_size, pp=pp, cp=cp, tp=tp)
    grid = torch.arange(world_size).view(dp, pp, cp, tp)
    watchdog = watchdog or Watchdog()
    axis = partial(_axis, comm=comm, rank=rank, watchdog=watchdog)
    axes = {
        name: axis(name, (name,), grid, lanes=2 if name in ("pp", "cp") else 1) for name in AXES
    }
    ranks = tuple(range(world_size))
    return Mesh(
        **axes,
        data=axis("data", ("dp", "cp"), grid) if cp > 1 else axes["dp"],
        back=axis("back", ("pp",), grid, lanes=2) if pp > 1 else axes["pp"],
        ends=axis("ends", ("pp",), grid[:, [0, -1]]) if pp > 2 else axes["pp"],
        # group None: all ranks
        world=Axis(name="world", ranks=ranks, index=rank, comm=comm, watchdog=watchdog),
        device_mesh=_device_mesh(axes, grid),
    )


def data_parallel_degree(world_size: int, *, pp: int = 1, cp: int = 1, tp: int = 1) -> int:
    """How many replicas there are room for.

    Raises: ConfigError where the other degrees do not divide the world.
    """
    model = prod((pp, cp, tp))
    if world_size % model:
        degrees = {"pp": pp, "cp": cp, "tp": tp}
        given = " * ".join(f"parallel.{name} = {n}" for name, n in degrees.items() if n > 1)
        raise ConfigError(
            f"{given}: {model} ranks hold one copy of the model, but there are {world_size} ranks. "
            f"Start a multiple of {model}, or lower a degree."
        )
    return world_size // model


def _axis(
    name: str,
    along: Sequence[str],
    grid: Tensor,
    *,
    comm: Comm,
    rank: int,
    watchdog: Watchdog,
    lanes: int = 1,
) -> Axis:
    """Every rank makes all groups of an axis, in the same order, and keeps its own.

    lanes: how many groups of the same ranks, the first of which is for collectives as well.
    """
    moving = [AXES.index(axis) for axis in along]
    fixed = [dim for dim in range(grid.ndim) if dim not in moving]
    size = prod(grid.shape[dim] for dim in moving)
    rows = grid.permute(*fixed, *moving).reshape(-1, size).tolist()
    mine: tuple[int, ...] = (rank,)  # of a grid that leaves this rank out
    groups: list[Group] = [None]
    for row in rows:
        made = [comm.new_group(row) for _ in range(lanes)] if size > 1 else [None]
        if rank in row:
            mine, groups = tuple(row), made
    return Axis(
        name=name,
        ranks=mine,
        index=mine.index(rank),
        comm=comm,
        group=groups[0],
        lanes=(groups[0], groups[-1]),
        watchdog=watchdog,
    )


def _device_mesh(axes: dict[str, Axis], grid: Tensor) -> object | None:
    if not is_available():
        return None
    from torch.distributed import GroupMember, ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    wide = tuple(name for name in AXES if axes[name].size > 1)
    groups = [axes[name].group or GroupMember.WORLD for name in wide]
    mine = [group for group in groups if isinstance(group, ProcessGroup)]
    if not mine or len(mine) < len(groups):
        return None
    device = "cuda" if mine[0].name() == "nccl" else "cpu"
    if len(mine) == 1:
        return DeviceMesh.from_group(mine[0], device, mesh_dim_names=wide)
    shape = [axes[name].size for name in wide]
    return DeviceMesh.from_group(mine, device, mesh=grid.view(shape), mesh_dim_names=wide)
