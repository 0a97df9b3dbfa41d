"""A rank's events in Chrome's trace format, which Perfetto and chrome://tracing show.

A process is a rank; a thread is what it computes, or an axis of the mesh that it speaks along;
times are in microseconds. ("Trace Event Format",
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from picotron_core.parallel.clock import Stamp
from picotron_core.parallel.timeline import Event
from picotron_core.parallel.traffic import Call

Entry = dict[str, Any]  # one event of the format

COMPUTE = "compute"
LANES = (COMPUTE, "dp", "pp", "back", "ends", "cp", "tp", "data", "world", "other")


def entries_of(
    events: Sequence[Event],
    calls: Sequence[Call],
    *,
    rank: int,
    title: str,
    us: Callable[[Stamp], float],
) -> list[Entry]:
    """All entries of a rank.

    Args:
        title: what the rank is called.
        us: a stamp in microseconds from the trace's beginning. What has not ended by the last stamp
            gets that for its end, and `unfinished`.
    """
    stamps = [s for e in events for s in (e.start, e.end)] + [c.end or c.start for c in calls]
    last = max((us(stamp) for stamp in stamps if stamp is not None), default=0.0)

    def entry(name: str, kind: str, start: Stamp, end: Stamp | None, facts: Entry) -> Entry:
        begin, unfinished = us(start), {} if end is not None else {"unfinished": 1}
        until = last if end is None else us(end)
        return {
            "name": name,
            "cat": kind,
            "ph": "X",
            "ts": round(begin, 3),
            "dur": round(until - begin, 3),
            "pid": rank,
            "args": facts | unfinished,
        }

    lanes = {COMPUTE: [entry(e.name, e.kind, e.start, e.end, dict(e.facts)) for e in events]}
    busy: dict[str, float] = {}  # lane -> until when
    for call in sorted(calls, key=lambda call: us(call.start)):
        mine = [entry(call.op, "comm", call.start, call.end, _facts(call, us))]
        if call.wait is not None:
            facts = {"op": call.op, "axis": call.axis}
            mine.append(entry("wait", "wait", call.wait, call.end, facts))
        lane = _free_lane(busy, call.axis, us(call.start))
        busy[lane] = last if call.end is None else us(call.end)
        lanes.setdefault(lane, []).extend(mine)

    found = [_name("process", rank, 0, title), _order("process", rank, 0, rank)]
    for thread, lane in enumerate(sorted(lanes, key=_order_of_lane)):
        found += [_name("thread", rank, thread, lane), _order("thread", rank, thread, thread)]
        found += [{**one, "tid": thread} for one in lanes[lane]]
    return found


def _facts(call: Call, us: Callable[[Stamp], float]) -> Entry:
    waited = call.wait is not None and call.end is not None
    return {
        **call.facts,
        "axis": call.axis,
        "bytes": call.size,
        "sent": call.moved,
        "dtype": call.dtype,
        "ranks": len(call.ranks),
        "wait_us": round(us(call.end) - us(call.wait), 3) if waited else 0,
        **({} if call.peer is None else {"peer": call.peer}),
    }


def _free_lane(busy: Mapping[str, float], axis: str, start: float) -> str:
    """The axis' own lane, or where another call is still under way there its next: what overlaps on
    one thread without lying within each other cannot be drawn.
    """
    number = 1
    while True:
        lane = axis if number == 1 else f"{axis} {number}"
        if busy.get(lane, start) <= start:
            return lane
        number += 1


def _order_of_lane(lane: str) -> tuple[int, int]:
    axis, _, number = lane.partition(" ")
    return LANES.index(axis), int(number or 1)


def _name(what: str, rank: int, thread: int, name: str) -> Entry:
    return _about(f"{what}_name", rank, thread, {"name": name})


def _order(what: str, rank: int, thread: int, index: int) -> Entry:
    return _about(f"{what}_sort_index", rank, thread, {"sort_index": index})


def _about(name: str, rank: int, thread: int, facts: Entry) -> Entry:
    return {"name": name, "ph": "M", "pid": rank, "tid": thread, "args": facts}


def document(entries: Iterable[Entry], about: Entry) -> Entry:
    """The whole file. about: what is true of all of it."""
    return {"traceEvents": list(entries), "displayTimeUnit": "ms", "otherData": about}
