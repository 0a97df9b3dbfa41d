"""A copy of this rank's part in the host's memory, so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

MARGIN = 256 << 20  # bytes that must stay free beside the copy


class Snapshot:
    """One flat float32 buffer, made at the first save and used again by every other."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def make_room(self, tensors: Sequence[Tensor], *, ranks_here: int) -> bool:
        """Have the buffer for flat float32 tensors; False where there is no memory for it.

        Args:
            ranks_here: ranks of this machine, which all are about to take as much.
        """
        size = sum(tensor.numel() for tensor in tensors)
        if self.buffer is not None and len(self.buffer) == size:
            return True
        self.buffer = None
        free = available_bytes()
        if free is not None and free < ranks_here * (4 * size + MARGIN):
            return False
        try:
            cuda = tensors[0].is_cuda if tensors else False
            self.buffer = torch.empty(size, dtype=torch.float32, pin_memory=cuda)
        except (RuntimeError, MemoryError):  # pinned memory has limits of its own
            return False
        return True

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors that there is room for, end to end. On CUDA the copy is on its way:
        later kernels wait for it, not this call.
        """
        assert self.buffer is not None
        end = 0
        for tensor in tensors:
            begin, end = end, end + tensor.numel()
            self.buffer[begin:end].copy_(tensor, non_blocking=True)
        if tensors and tensors[0].is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensors[0].device))

    def give_back(self) -> None:
        """The next save asks for memory anew."""
        self.buffer = None

    def wait(self) -> Tensor:
        """The buffer, once all is in it. Any thread may wait."""
        if self._copied:
            self._copied.synchronize()
        assert self.buffer is not None
        return self.buffer


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be taken without swapping: the machine's, or what any of the control groups
    that this process is in may still have; None where Linux does not say.
    """
    machine = _number(root / "proc/meminfo", "MemAvailable:", 1024)
    known = [machine, *(_left(*group) for group in _groups(root))]
    return min((number for number in known if number is not None), default=None)


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """What a control group may still take; None where it has no limit."""
    bound, taken = _number(folder / limit), _number(folder / used)
    if bound is None or taken is None:
        return None
    return bound - taken + (_number(folder / "memory.stat", cached) or 0)  # given back when asked


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The memory control groups of this process up to the root: a limit holds for all below it.
    (folder, its limit's file, its use's, the cache's name in memory.stat), cgroup versions 2 and 1.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, the number 0 and no controllers in version 2
        _, controllers, path = line.split(":", 2)
        here = PurePosixPath(path)
        for group in (here, *here.parents):
            below = str(group).lstrip("/")
            if not controllers:
                files = ("memory.max", "memory.current", "inactive_file")
                yield (root / "sys/fs/cgroup" / below, *files)
            elif "memory" in controllers.split(","):
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield (root / "sys/fs/cgroup/memory" / below, *files)


def _number(path: Path, label: str = "", unit: int = 1) -> int | None:
    """The number in a file, or after a label at the beginning of one of its lines."""
    try:
        text = path.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        words = line.removeprefix(label).split()
        if line.startswith(label) and words and words[0].isdecimal():
            return int(words[0]) * unit
    return None
