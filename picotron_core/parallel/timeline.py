"""What this rank does, and when: spans that lie in one another, each from a start to an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from picotron_core.parallel.clock import Stamp


class Span(Protocol):
    """`with span("forward", micro_batch=3): ...` says that this happens in there.

    Whatever lies in a span has its facts as well: an op knows its micro-batch.
    """

    def __call__(self, name: str, /, **facts: int | str) -> AbstractContextManager[object]: ...


_NOTHING = nullcontext()


def no_span(name: str, /, **facts: int | str) -> AbstractContextManager[object]:
    """The `Span` of a run that is not traced."""
    return _NOTHING


@dataclass(slots=True, kw_only=True, eq=False)
class Event:
    """kind: phase, op, or what else its reader tells apart. end: None as long as it lasts."""

    name: str
    kind: str
    start: Stamp
    end: Stamp | None = None
    facts: dict[str, int | str]


@dataclass(slots=True)
class Timeline:
    """The events of one rank, while `on`; in their order of starting."""

    now: Callable[[], Stamp]
    on: bool = False
    events: list[Event] = field(default_factory=list)
    _open: list[Event] = field(default_factory=list)

    def span(self, name: str, /, **facts: int | str) -> AbstractContextManager[object]:
        return self._lasting(name, facts) if self.on else _NOTHING

    @contextmanager
    def _lasting(self, name: str, facts: dict[str, int | str]) -> Iterator[None]:
        event = self.begin(name, kind="phase", facts=facts)
        try:
            yield
        finally:
            self.end(event)

    def begin(self, name: str, *, kind: str, facts: dict[str, int | str]) -> Event:
        """Open an event for `end`, where a `with` cannot enclose what happens.

        No op lies in another: one that begins ends the one before, should that be open.
        """
        if kind == "op" and self._open and self._open[-1].kind == "op":
            self.end(self._open[-1])
        event = Event(name=name, kind=kind, start=self.now(), facts=self.facts() | facts)
        self.events.append(event)
        self._open.append(event)
        return event

    def end(self, event: Event) -> None:
        """Close an event, and what was left open in it."""
        event.end = self.now()
        if event in self._open:  # else the recording stopped in its midst
            del self._open[self._open.index(event) :]

    def facts(self) -> dict[str, int | str]:
        """What the open spans say of whatever begins now."""
        return self._open[-1].facts if self._open else {}

    def stop(self) -> None:
        self.on = False
        self._open.clear()
