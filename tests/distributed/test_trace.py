"""A trace of a real pipeline says what its schedule and its sizes imply, on one clock."""

from __future__ import annotations

import json
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from picotron_core.cli.trace.recording import read_recordings

STEPS = (3, 4)
B, T, E, V = 2, 32, 32, 300  # of `tiny`, with a micro-batch of 2
FLOAT32 = 4
# 1F1B of three micro-batches over two stages, by hand.
ORDER = (["F0", "F1", "B0", "F2", "B1", "B2"], ["F0", "B0", "F1", "B1", "F2", "B2"])
SKEW_S = 7  # by which the second rank's clock is ahead, as another machine's may be

SCRIPT = f"""
import os, sys, time
if os.environ["RANK"] == "1":
    right = time.monotonic_ns
    time.monotonic_ns = lambda: right() + {SKEW_S} * 10**9
from picotron_core.cli import main
sys.argv = ["picotron", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, run_ranks) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    settings = ("--parallel.pp", "2", "--train.accumulation", "3", "--train.micro_batch", str(B))
    where = ("--run.dir", str(folder), "--name", "two", "--train.steps", "5")
    command = ["-c", SCRIPT, "train", *tiny, *where, *settings, "--trace"]
    results = run_ranks(command, world_size=2)
    assert [result.returncode for result in results] == [0, 0], results
    return folder / "two"


@pytest.fixture(scope="module")
def ranks(run) -> list[list[dict[str, Any]]]:
    paths = sorted((run / "trace").iterdir())
    assert [path.name for path in paths] == ["rank-0000.json", "rank-0001.json"]
    documents = [json.loads(path.read_text()) for path in paths]
    return [[e for e in document["traceEvents"] if e["ph"] == "X"] for document in documents]


def named(events, name: str, **facts: Any) -> list[dict[str, Any]]:
    found = [e for e in events if e["name"] == name and facts.items() <= e["args"].items()]
    return sorted(found, key=lambda event: event["ts"])


def end(event) -> float:
    return event["ts"] + event["dur"]


def test_the_trace_is_of_the_steps_that_were_asked_for(ranks):
    for events in ranks:
        assert [e["args"]["step"] for e in named(events, "step")] == list(STEPS)
        assert not any("unfinished" in event["args"] for event in events)


def test_what_a_rank_does_is_drawable_each_thing_within_another(ranks):
    for number, events in enumerate(ranks):
        assert {event["pid"] for event in events} == {number}
        assert all(event["dur"] >= 0 for event in events)
        ordered = sorted(events, key=lambda e: (e["tid"], e["ts"], -e["dur"]))
        for _, lane in groupby(ordered, key=lambda event: event["tid"]):
            around: list[dict[str, Any]] = []
            for event in lane:
                while around and end(around[-1]) <= event["ts"]:
                    around.pop()
                assert not around or end(event) <= end(around[-1]) + 1e-3, (event, around[-1])
                around.append(event)


def test_the_actions_are_the_schedules_in_its_order(ranks):
    for events, wanted in zip(ranks, ORDER, strict=True):
        for step in STEPS:
            actions = named(events, "forward", step=step)
            actions += named(events, "backward", step=step)
            actions.sort(key=lambda event: event["ts"])
            assert [f"{e['name'][0].upper()}{e['args']['micro_batch']}" for e in actions] == wanted
            assert all(end(one) <= two["ts"] for one, two in pairwise(actions))


def test_clocks_that_differ_are_made_one(run, ranks):
    """A stage cannot begin before it has what the stage before sent."""
    about = [recording.about for recording in read_recordings(run)]
    assert about[0]["clock_offset_us"] == about[0]["clock_error_us"] == 0
    error = about[1]["clock_error_us"]
    assert abs(about[1]["clock_offset_us"] - SKEW_S * 1e6) <= error < 0.1 * SKEW_S * 1e6
    for step in STEPS:
        for micro_batch in range(3):
            facts = {"step": step, "micro_batch": micro_batch}
            (down, after) = (named(events, "forward", **facts)[0] for events in ranks)
            assert end(down) <= after["ts"] + error
            (after, up) = (named(events, "backward", **facts)[0] for events in ranks)
            assert end(up) <= after["ts"] + error


def test_every_message_has_its_axis_its_bytes_and_its_wait(ranks):
    hidden, table = B * T * E * FLOAT32, V * E * FLOAT32
    for events, (gives, takes), (send, recv) in (
        (ranks[0], (1, 1), ("pp", "back")),
        (ranks[1], (0, 0), ("back", "pp")),
    ):
        for step in STEPS:
            calls = [e for e in events if e["cat"] == "comm"]
            calls = [e for e in calls if e["args"].get("step") == step]  # none in between
            found = sorted((e["args"]["axis"], e["name"], e["args"]["bytes"]) for e in calls)
            assert found == sorted(
                [(send, "send", hidden)] * 3
                + [(recv, "recv", hidden)] * 3
                + [("pp", "all_reduce", table)]  # the tied embedding's gradients
                + [("world", "all_reduce", 3 * 8)]  # loss, tokens, norm: float64
            )
            assert {e["args"]["peer"] for e in calls if e["name"] == "send"} == {gives}
            assert {e["args"]["peer"] for e in calls if e["name"] == "recv"} == {takes}
            sent = {e["name"]: e["args"]["sent"] for e in calls if e["args"]["axis"] != "world"}
            assert sent == {"send": hidden, "recv": 0, "all_reduce": table}  # 2 (N - 1) / N
        for call in [event for event in events if event["cat"] == "comm"]:
            waits = [
                w
                for w in named(events, "wait")
                if w["tid"] == call["tid"] and call["ts"] <= w["ts"] and end(w) <= end(call) + 1e-3
            ]
            assert sum(w["dur"] for w in waits) == pytest.approx(call["args"]["wait_us"], abs=0.01)


def test_every_op_is_there_forward_and_backward(ranks):
    for stage, events in enumerate(ranks):
        ops = {"attention": 1, "norm": 2 + stage, "rope": 1, "swiglu": 1, "loss": stage}
        for facts in ({"step": s, "micro_batch": m} for s in STEPS for m in range(3)):
            for way in ("forward", "backward"):
                (action,) = named(events, way, **facts)
                for op, count in ops.items():
                    mine = named(events, op, **facts)
                    mine = [e for e in mine if e["args"].get("direction", "forward") == way]
                    assert len(mine) == count, (op, way)
                    assert all(action["ts"] <= e["ts"] and end(e) <= end(action) for e in mine)
                    if op in ("attention", "rope", "swiglu"):  # one layer a stage
                        assert [e["args"]["layer"] for e in mine] == [stage]
        assert len(named(events, "optimizer")) >= 2 * len(STEPS)  # the phase, and the op


def test_the_command_counts_merges_and_draws(picotron, run, ranks):
    code, out, err = picotron("trace", str(run))
    assert (code, err) == (0, "")
    assert "steps 3 to 4" in out
    assert "1F1B, 2 stages, 3 micro-batches: idle " in out
    assert "by the formula 25%" in out
    rows = [line.split() for line in out.splitlines()]
    megabytes = f"{3 * B * T * E * FLOAT32 / 1e6:.3f}"
    assert any(row[:5] == ["pp", "send", "3", megabytes, megabytes] for row in rows)
    merged = json.loads((run / "trace" / "all.json").read_text())
    assert [e for e in merged["traceEvents"] if e["ph"] == "X"] == [*ranks[0], *ranks[1]]
    with Image.open(run / "trace" / "schedule.png") as picture:
        assert picture.size[0] > 800
