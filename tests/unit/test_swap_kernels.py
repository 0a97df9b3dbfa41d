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


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    """The losses under naive-math for every op, measured once by the first test that asks."""
    return {}


def first_losses(picotron, tiny, tmp_path, backends: str) -> list[float]:
    """20 steps with documents kept apart, so that masks and doc_ids are at work too."""
    steps = ("--train.steps", "20", "--train.accumulation", "2", "--data.document_mask", "true")
    code, _, err = picotron("train", *tiny, *steps, "--name", "run", "--backends", backends)
    assert (code, err) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    selected = {e["op"]: e["backend"] for e in json.loads((run / "backends.json").read_text())}
    for wish in backends.split(";"):
        op, equals, name = wish.partition("=")
        if equals:
            assert selected[op] == f"picotron/{name}"
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


@pytest.mark.parametrize(("op", "name"), SWAPS)
def test_the_first_20_losses_agree(picotron, tiny, tmp_path, tmp_path_factory, reference, op, name):
    if not reference:
        reference["naive-math"] = first_losses(picotron, tiny, tmp_path, "naive-math")
        for path in (tmp_path / "runs").iterdir():
            path.rename(tmp_path_factory.mktemp("reference") / path.name)
    found = first_losses(picotron, tiny, tmp_path, f"{op}={name};naive-math")
    assert len(found) == 20
    assert found[0] - found[-1] > 0.2
    assert found == pytest.approx(reference["naive-math"], rel=1e-4)
