"""A trace of a few steps: which steps, by whose clock, and into which file.

torch.profiler would show every kernel, in files a hundred times as large, on a clock of each
process's own; it knows no axis, no micro-batch and no bytes. This shows what a scheme does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from picotron_core.engine.chrome import document, entries_of
from picotron_core.engine.traced_ops import trace_layers, traced_ops
from picotron_core.files import make_folder, remove_file, replace_text
from picotron_core.model.llama import Llama
from picotron_core.ops import Ops
from picotron_core.parallel.clock import Stamp, clock_of
from picotron_core.parallel.mesh import AXES, Mesh
from picotron_core.parallel.timeline import Timeline
from picotron_core.parallel.traffic import NotedComm
from picotron_core.parallel.world import World
from picotron_core.schema import Parallel

log = logging.getLogger("picotron")
T = TypeVar("T")

WRITTEN = ("rank-*.json", "all.json", "*.png")  # into a run's folder of traces
WARMUP = 2  # steps before the traced ones, where there are so many: the first ones make buffers


class Trace:
    """This rank's trace of `steps` steps, for `folder`/rank-0003.json."""

    def __init__(self, folder: Path, world: World, *, steps: int, device: torch.device) -> None:
        self.folder, self.world, self.steps = folder, world, steps
        self.clock = clock_of(device)
        self.timeline = Timeline(self.clock.now)
        self._begun = False

    def watch_ops(self, ops: Ops) -> Ops:
        """The ops to run with: before `comm` starts."""
        traced = traced_ops(ops, self.timeline)
        assert isinstance(traced.comm, NotedComm)
        self._comm = traced.comm
        return traced

    def watch_model(self, model: Llama, mesh: Mesh, settings: Parallel) -> None:
        """The rank's model and its place, once it has one."""
        trace_layers(model, self.timeline)
        self._comm.name_axes(mesh)
        self._place = {name: getattr(mesh, name).index for name in AXES}
        self._degrees = {name: getattr(mesh, name).size for name in AXES}
        self._about: dict[str, Any] = {
            "rank": self.world.rank,
            "world_size": self.world.size,
            "place": self._place,
            "degrees": self._degrees,
            "parallel": settings.model_dump(),
        }

    def recorded(self, records: Iterable[T], *, left: int) -> Iterator[T]:
        """The records of as many steps as are `left`; what the caller does between them, a save or
        an evaluation, is of the step before. A second time, after a run went back, records nothing.
        """
        first = min(WARMUP, max(0, left - self.steps))
        again, self._begun = self._begun, True
        if first == 0 and not again:
            self._start()
        for done, record in enumerate(records, 1):
            yield record
            if done == first and not again:
                self._start()
            elif done == first + self.steps:
                self.finish()

    def _start(self) -> None:
        """All ranks come here together: the first tells the time that all count from."""
        if self.world.is_first:
            self._make_room()
        self.offset_ns, self.error_ns = self.world.clock_offset("trace")
        self.clock.start()
        now = self.world.share("trace/zero", lambda: str(self.clock.ns(self.clock.now())))
        self.zero_ns = int(now)
        self.timeline.on = self._comm.on = True

    def _make_room(self) -> None:
        """Remove the files of an earlier trace: the run may have had more ranks then."""
        if self.folder.is_symlink():
            return  # what it points to is not this run's; writing into it will be refused
        for stale in (path for name in WRITTEN for path in self.folder.glob(name)):
            try:
                remove_file(stale)
            except OSError as error:  # a picture is not worth a run
                log.warning("%s cannot be removed: %s", stale, error)

    def finish(self) -> None:
        """Write down what there is, once."""
        if not self.timeline.on:
            return
        self.timeline.stop()
        self._comm.on = False
        entries = entries_of(
            self.timeline.events,
            self._comm.calls,
            rank=self.world.rank,
            title=self._title(),
            us=self._us,
        )
        clock = {
            "clock_offset_us": self.offset_ns / 1000,
            "clock_error_us": self.error_ns / 1000,
        }
        path = self.folder / f"rank-{self.world.rank:04d}.json"
        try:
            make_folder(self.folder)
            text = json.dumps(document(entries, self._about | clock), separators=(",", ":"))
            replace_text(path, text)
        except OSError as error:  # a picture is not worth a run
            log.warning("%s cannot be written: %s", path, error)
        self.timeline.events, self._comm.calls = [], []

    def _us(self, stamp: Stamp) -> float:
        """Microseconds from the trace's beginning, by the first rank's clock."""
        return (self.clock.ns(stamp) - self.offset_ns - self.zero_ns) / 1000

    def _title(self) -> str:
        place = [f"{axis} {n}" for axis, n in self._place.items() if self._degrees[axis] > 1]
        return ", ".join([f"rank {self.world.rank}", *place])
