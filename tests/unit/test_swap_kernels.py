"""Any kernel can be swapped under a run: its losses stay, within float32 rounding."""

import json

import pytest

from picotron_core.registry import Candidate
from picotron_core.registry.plugins import load_registry

# comm's other backends need several processes: tests/distributed has them.
SWAPS = sorted(
    (candidate.backend.op, candidate.backend.name)
    for candidate in load_registry().candidates
    if candidate.backend.op != "comm"
)


def test_every_op_has_a_choice_to_make():
    assert isinstance(load_registry().candidates[0], Candidate)
    attention = {name for op, name in SWAPS if op == "attention"}
    assert attention == {"naive-math", "sdpa", "mem_efficient"}
    assert len(SWAPS) >= 11


# Longer than a block of mem_efficient, so that its online softmax has something to carry over.
LONG = ("--data.seq_len", "300", "--model.max_position_embeddings", "300")
LONG += ("--train.micro_batch", "1", "--train.lr", "3e-3")


def first_losses(picotron, tiny, tmp_path, backends: str, *more: str) -> list[float]:
    """20 steps of two micro-batches."""
    steps = ("--train.steps", "20", "--train.accumulation", "2", *more)
    code, _, err = picotron("train", *tiny, *steps, "--name", "run", "--backends", backends)
    assert (code, err) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    selected = {e["op"]: e["backend"] for e in json.loads((run / "backends.json").read_text())}
    for wish in backends.split(";"):
        op, equals, name = wish.partition("=")
        if equals:
            assert selected[op] == f"picotron/{name}"
    (run.parent).rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@pytest.mark.parametrize("mask", ["true", "false"])
def test_the_first_20_losses_agree_under_every_attention(picotron, tiny, tmp_path, mask):
    """With documents kept apart by doc_ids, and without, where each takes its quickest way."""
    more = (*LONG, "--data.document_mask", mask)
    wanted = first_losses(picotron, tiny, tmp_path, "naive-math", *more)
    assert len(wanted) == 20
    assert wanted[0] - wanted[-1] > 0.2
    for name in ("sdpa", "mem_efficient"):
        found = first_losses(picotron, tiny, tmp_path, f"attention={name};naive-math", *more)
        assert found == pytest.approx(wanted, rel=1e-4), name


def test_the_first_20_losses_agree_under_every_other_backend(picotron, tiny, tmp_path):
    wanted = first_losses(picotron, tiny, tmp_path, "naive-math")
    others = [(op, name) for op, name in SWAPS if op != "attention" and name != "naive-math"]
    assert len(others) >= 4
    for op, name in others:
        found = first_losses(picotron, tiny, tmp_path, f"{op}={name};naive-math")
        assert found == pytest.approx(wanted, rel=1e-4), (op, name)
