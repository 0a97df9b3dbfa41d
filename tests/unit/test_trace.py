"""Tracing changes nothing, costs nothing where it is off, and its pictures count right."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from picotron_backends.one_process import OneProcess
from PIL import Image

from picotron_core.cli import train as command
from picotron_core.cli.trace.recording import Happening, Recording
from picotron_core.cli.trace.ring import turns_of
from picotron_core.cli.trace.schedule import bubble, draw_schedule, title_of
from picotron_core.engine.chrome import entries_of
from picotron_core.engine.trace import Trace
from picotron_core.engine.traced_ops import trace_layers, traced_ops
from picotron_core.model.architecture import Architecture
from picotron_core.model.llama import Llama
from picotron_core.ops import Ops
from picotron_core.parallel.timeline import Timeline, no_span
from picotron_core.parallel.traffic import Call, NotedComm
from picotron_core.parallel.world import World
from picotron_core.registry.plugins import load_registry

DEGREES = {"dp": 1, "pp": 1, "cp": 1, "tp": 1}


def lines(run: Path) -> list[tuple[float, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in found if "loss" in line]


def steps_of(path: Path) -> list[int]:
    events = json.loads(path.read_text())["traceEvents"]
    return [e["args"]["step"] for e in events if e["name"] == "step"]


@pytest.mark.parametrize("backends", ["*=auto", "naive-math"])
def test_a_traced_run_computes_the_same_bits(picotron, tiny, tmp_path, backends):
    more = ("--train.steps", "5", "--train.accumulation", "2", "--backends", backends)
    assert picotron("train", *tiny, *more, "--name", "plain")[0] == 0
    assert picotron("train", *tiny, *more, "--name", "traced", "--trace")[0] == 0
    runs = tmp_path / "runs"
    assert lines(runs / "traced") == lines(runs / "plain")
    assert not (runs / "plain" / "trace").exists()
    assert steps_of(runs / "traced" / "trace" / "rank-0000.json") == [3, 4]


def test_a_run_that_is_not_traced_calls_the_kernels_themselves(picotron, tiny, monkeypatch):
    seen = {}

    def train(state, *, ops, span, **settings):
        seen.update(ops=ops, span=span, model=state.model)
        return original(state, ops=ops, span=span, **settings)

    original = command.train
    monkeypatch.setattr(command, "train", train)
    assert picotron("train", *tiny, "--train.steps", "1", "--backends", "naive-math")[0] == 0
    kernels = {
        candidate.backend.op: candidate.backend.load()
        for candidate in load_registry().candidates
        if candidate.backend.name == "naive-math"
    }
    assert len(kernels) == 6
    for op, kernel in kernels.items():
        assert getattr(seen["ops"], op) is kernel
    assert not isinstance(seen["ops"].comm, NotedComm)
    assert seen["span"] is no_span
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen["model"].modules())


def test_an_op_lasts_in_backward_as_long_as_what_it_added_to_the_graph():
    """Of naive-math every node tells by its name whether an op or a projection made it."""
    kernels = {
        candidate.backend.op: candidate.backend.load()
        for candidate in load_registry().candidates
        if candidate.backend.name == "naive-math"
    }
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    timeline = Timeline(count().__next__, on=True)
    ops = traced_ops(Ops(**kernels, comm=OneProcess()), timeline)
    model = Llama(Architecture(vocab_size=11, **sizes, **heads), ops)
    trace_layers(model, timeline)
    ids = torch.arange(6)[None]
    loss = model.loss(ids, ids)

    seen: list[tuple[int, str]] = []

    def note(name: str) -> None:
        seen.append((timeline.now(), name))

    ahead, known = [loss.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in known:
            known.add(node)
            node.register_prehook(lambda _, name=node.name: note(name()))
            ahead += [following for following, _ in node.next_functions]
    loss.backward()

    ops_of: dict[str, set[str]] = {}
    backward = [event for event in timeline.events if event.facts.get("direction") == "backward"]
    assert Counter(event.name for event in backward) == {
        **{"norm": 5, "attention": 2, "rope": 2, "swiglu": 2, "loss": 1}
    }
    for when, name in seen:
        mine = {e.name for e in backward if e.start < when < e.end} or {"none"}
        ops_of.setdefault(name, set()).update(mine)
    assert ops_of["MmBackward0"] == {"none", "loss"}  # the projections, and naive-math's logits
    assert ops_of["EmbeddingBackward0"] == {"none"}
    for name, op in (("Softmax", "attention"), ("Silu", "swiglu"), ("Rsqrt", "norm")):
        assert ops_of[f"{name}Backward0"] == {op}
    assert ops_of["CatBackward0"] == {"rope"}


def test_what_overlaps_has_lanes_of_its_own():
    def call(start: int, wait: int | None, end: int | None) -> Call:
        return Call(
            op="send",
            axis="pp",
            ranks=(0, 1),
            dtype="float32",
            size=8,
            moved=8,
            start=start,
            wait=wait,
            end=end,
        )

    timeline = Timeline(count(0, 1000).__next__, on=True)
    with timeline.span("forward", micro_batch=1):
        event = timeline.begin("norm", kind="op", facts={"layer": 2})
        timeline.end(event)
    calls = [call(0, 5000, 6000), call(1000, 7000, 8000), call(6000, 6000, 9000)]
    calls.append(call(8000, None, None))
    entries = entries_of(timeline.events, calls, rank=3, title="rank 3", us=lambda s: s / 1000)
    lanes = {e["tid"]: e["args"]["name"] for e in entries if e["name"] == "thread_name"}
    assert lanes == {0: "compute", 1: "pp", 2: "pp 2"}
    found = [(lanes[e["tid"]], e["name"], e["ts"], e["dur"]) for e in entries if e["ph"] == "X"]
    assert found == [
        ("compute", "forward", 0, 3),
        ("compute", "norm", 1, 1),
        *[("pp", "send", 0, 6), ("pp", "wait", 5, 1), ("pp", "send", 6, 3), ("pp", "wait", 6, 3)],
        *[("pp 2", "send", 1, 7), ("pp 2", "wait", 7, 1), ("pp 2", "send", 8, 1)],
    ]
    facts = [e["args"] for e in entries if e["ph"] == "X"]
    assert facts[1] == {"micro_batch": 1, "layer": 2}
    assert facts[-1]["unfinished"] == 1  # nobody waited for it so far
    assert facts[2]["wait_us"] == 1


def test_a_barrier_is_waited_for_from_its_start():
    noted = NotedComm(OneProcess(), now=count(10).__next__)
    noted.barrier()
    (call,) = noted.calls
    assert (call.op, call.start, call.wait, call.end) == ("barrier", 10, 10, 11)
    noted.on = False
    noted.all_reduce(torch.ones(1))
    assert noted.calls == [call]


def recording(rank: int, happenings: list[Happening], **degrees: int) -> Recording:
    (axis,) = degrees or {"dp": 1}
    place = dict.fromkeys(DEGREES, 0) | {axis: rank}
    about = {"rank": rank, "degrees": DEGREES | degrees, "place": place}
    about["parallel"] = {"schedule": "afab"}
    end = max(happening.end for happening in happenings)
    step = Happening(name="step", kind="phase", start=0, end=end, facts={"step": 4})
    return Recording(path=Path(), about=about, happenings=(step, *happenings))


def afab(stage: int, *, stages: int, micro_batches: int, wait: float) -> list[Happening]:
    """A forward takes 1 ms and a backward 2; `wait` ms of each forward are spent on others."""
    found = []
    turn = micro_batches + stages - 1
    for m in range(micro_batches):
        down, up = stage + m, turn + 2 * (stages - 1 - stage + m)
        facts = {"step": 4, "micro_batch": m, "chunk": 0}
        for name, start, ms in (("forward", down, 1), ("backward", up, 2)):
            found.append(
                Happening(name=name, kind="phase", start=start, end=start + ms, facts=facts)
            )
        facts = {"axis": "tp", "op": "all_reduce"}
        found.append(Happening(name="wait", kind="wait", start=down, end=down + wait, facts=facts))
    return found


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 3), (4, 8), (3, 1)])
def test_a_perfect_pipeline_idles_by_the_formula(tmp_path, stages, micro_batches):
    def ranks(wait: float) -> list[Recording]:
        sizes = {"stages": stages, "micro_batches": micro_batches, "wait": wait}
        return [recording(s, afab(s, **sizes), pp=stages) for s in range(stages)]

    share = (stages - 1) / (micro_batches + stages - 1)
    found = bubble(ranks(0))
    assert found.seen == pytest.approx(share)
    assert found.ideal == pytest.approx(share)
    # Of 3 ms that a micro-batch takes on a stage, half a one is not computed in.
    assert bubble(ranks(0.5)).seen == pytest.approx(1 - (1 - share) * 2.5 / 3)
    title = title_of(ranks(0), tmp_path)
    assert title.endswith(f"idle {share:.0%}, by the formula {share:.0%}")
    draw_schedule(ranks(0), tmp_path / "schedule.png", title=title)
    with Image.open(tmp_path / "schedule.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**16)) > 3


def test_the_ring_is_that_of_the_last_layer_in_each_direction():
    def turn(layer: int, direction: str, number: int) -> Happening:
        facts = {"turn": number, "block": 1 - number, "direction": direction, "layer": layer}
        start = 10 * layer + 5 * number
        return Happening(name="ring", kind="phase", start=start, end=start + 4, facts=facts)

    layers = ((0, "forward"), (1, "forward"), (2, "backward"), (3, "backward"))
    rank = recording(1, [turn(*layer, number) for layer in layers for number in (0, 1)], cp=2)
    for direction, layer in (("forward", 1), ("backward", 3)):
        turns = turns_of(rank, direction)
        assert [(t.facts["layer"], t.facts["block"]) for t in turns] == [(layer, 1), (layer, 0)]


def test_a_run_without_a_trace_says_how_to_make_one(picotron, tmp_path):
    code, _, err = picotron("trace", str(tmp_path))
    assert code == 2
    assert "has no trace" in err
    assert "picotron train ... --trace" in err
    folder = tmp_path / "trace"
    folder.mkdir()
    about = {"rank": 0, "world_size": 3, "degrees": DEGREES, "place": {}}
    text = json.dumps({"traceEvents": [], "otherData": about})
    (folder / "rank-0000.json").write_text(text)
    code, _, err = picotron("trace", str(tmp_path))
    assert code == 2
    assert "lacks the traces of the ranks 1, 2. Copy them" in err
    (folder / "rank-0000.json").write_text(text[:-1])
    code, _, err = picotron("trace", str(tmp_path))
    assert code == 1
    assert "rank-0000.json is no trace of Picotron's" in err


def test_few_steps_are_recorded_and_resuming_records_none_unless_asked(
    picotron, tiny, tmp_path, monkeypatch
):
    assert picotron("train", *tiny, "--train.steps", "2", "--name", "one", "--trace")[0] == 0
    trace = tmp_path / "runs" / "one" / "trace" / "rank-0000.json"
    assert steps_of(trace) == [1, 2]
    before = trace.read_bytes()
    resume = ("train", "--resume", "runs/one", "--train.steps")
    assert picotron(*resume, "3")[0] == 0
    assert trace.read_bytes() == before
    assert picotron(*resume, "4", "--trace")[0] == 0  # two were asked for, there is one left
    assert steps_of(trace) == [4]

    monkeypatch.setattr("picotron_core.cli.trace.command.find_spec", lambda _: None)
    code, out, err = picotron("trace", "runs/one")  # without matplotlib: numbers all the same
    assert (code, err) == (0, "")
    assert "pip install 'picotron[plot]'" in out
    assert "step 4 of runs/one, 1 rank\n" in out
    assert {path.name for path in trace.parent.iterdir()} == {"rank-0000.json", "all.json"}


def test_what_cannot_be_removed_costs_a_warning_and_not_the_run(tmp_path, caplog):
    (tmp_path / "rank-0001.json").mkdir()  # no file: unlink refuses
    (tmp_path / "notes.txt").write_text("somebody's")
    Trace(tmp_path, World(), steps=1, device=torch.device("cpu"))._make_room()
    assert "rank-0001.json cannot be removed" in caplog.text
    assert (tmp_path / "notes.txt").read_text() == "somebody's"
