"""However the work is divided among ranks, it is the work of one: losses, gradients, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("layout_steps.py")
RTOL = 1e-5

Layout = dict[str, Any]


def run(run_ranks, layout: Layout, world_size: int, folder: Path) -> tuple[dict[str, Tensor], list]:
    output = folder / f"{abs(hash(json.dumps(layout)))}-{world_size}.safetensors"
    results = run_ranks([str(SCRIPT), json.dumps(layout), str(output)], world_size)
    for result in results:
        assert result.returncode == 0, result.stderr
    return load_file(output), [json.loads(result.stdout) for result in results]


@pytest.fixture(scope="module")
def alone(run_ranks, tmp_path_factory):
    """The run of one process, by everything that is no matter of layout."""
    kept: dict[str, dict[str, Tensor]] = {}

    def run_alone(**layout: Any) -> dict[str, Tensor]:
        key = json.dumps(layout, sort_keys=True)
        if key not in kept:
            kept[key] = run(run_ranks, layout, 1, tmp_path_factory.mktemp("alone"))[0]
        return kept[key]

    return run_alone


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = RTOL) -> None:
    """Each tensor as a whole: single numbers may be the rest of a cancellation."""
    assert found.keys() == wanted.keys()
    for name, right in wanted.items():
        error = torch.linalg.vector_norm((found[name] - right).double())
        size = torch.linalg.vector_norm(right.double())
        # Moments are of gradients at weights that already differ in their last digits.
        assert error <= rtol * size * (10 if name.startswith("exp_avg") else 1), name
    assert torch.allclose(found["losses"], wanted["losses"], rtol=rtol, atol=0)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(
    ("world_size", "accumulation", "tied", "documents"),
    [(2, 1, True, False), (3, 2, False, True), (4, 3, True, True)],
)
def test_replicas_train_the_run_of_one(
    run_ranks, alone, tmp_path, zero, world_size, accumulation, tied, documents
):
    model = {"tied": tied, "documents": documents}
    layout = {**model, "accumulation": accumulation, "parallel": {"zero": zero}}
    found, told = run(run_ranks, layout, world_size, tmp_path)
    close(found, alone(**model))
    for rank in told:
        whole = rank["all"]
        # every bucket is padded by less than the number of ranks
        wanted = -(-whole // world_size) + 60 if zero else whole
        assert rank["held"] <= wanted
    if zero:
        most, mean = max(r["held"] for r in told), sum(r["held"] for r in told) / world_size
        assert most <= 1.01 * mean
        assert sum(rank["held"] for rank in told) == told[0]["all"]


@pytest.mark.parametrize(
    ("world_size", "parallel", "accumulation", "tied", "documents"),
    [
        (2, {"tp": 2}, 1, True, False),
        (2, {"tp": 2, "sequence": True}, 3, False, True),
        (4, {"tp": 4, "sequence": True}, 1, True, True),
        (4, {"tp": 2, "zero": 1}, 2, False, True),
    ],
)
def test_slices_of_matrices_train_the_run_of_one(
    run_ranks, alone, tmp_path, world_size, parallel, accumulation, tied, documents
):
    model = {"tied": tied, "documents": documents}
    layout = {**model, "accumulation": accumulation, "parallel": parallel}
    found, _ = run(run_ranks, layout, world_size, tmp_path)
    close(found, alone(**model))


@pytest.mark.parametrize(
    ("world_size", "parallel", "accumulation", "tied", "documents"),
    [
        (2, {"pp": 2}, 3, True, False),
        (4, {"pp": 4, "schedule": "afab"}, 3, True, True),
        (3, {"pp": 3}, 1, False, True),
        (2, {"pp": 2, "schedule": "interleaved"}, 6, True, True),
        (4, {"pp": 2, "zero": 1}, 3, True, False),
        (4, {"pp": 2, "tp": 2, "sequence": True}, 3, True, True),
    ],
)
def test_stages_train_the_run_of_one(
    run_ranks, alone, tmp_path, world_size, parallel, accumulation, tied, documents
):
    model = {"tied": tied, "documents": documents}
    layout = {**model, "accumulation": accumulation, "parallel": parallel}
    found, _ = run(run_ranks, layout, world_size, tmp_path)
    close(found, alone(**model))


@pytest.mark.parametrize(
    ("world_size", "parallel", "accumulation", "tied", "documents"),
    [
        (2, {"cp": 2}, 1, True, False),
        (3, {"cp": 3}, 2, False, True),
        (4, {"cp": 4, "zero": 1}, 1, True, True),
        (4, {"cp": 2, "tp": 2, "sequence": True}, 3, False, True),
        (4, {"cp": 2, "pp": 2}, 3, True, True),
    ],
)
def test_parts_of_sequences_train_the_run_of_one(
    run_ranks, alone, tmp_path, world_size, parallel, accumulation, tied, documents
):
    model = {"tied": tied, "documents": documents}
    layout = {**model, "accumulation": accumulation, "parallel": parallel}
    found, _ = run(run_ranks, layout, world_size, tmp_path)
    close(found, alone(**model))


@pytest.mark.parametrize("parallel", [{"tp": 2, "sequence": True}, {"pp": 2}, {"zero": 1}])
def test_sixteen_bit_ranks_train_the_run_of_one_within_their_rounding(
    run_ranks, alone, tmp_path, parallel
):
    model = {"tied": True, "dtype": "bfloat16"}
    layout = {**model, "accumulation": 2, "parallel": parallel}
    found, _ = run(run_ranks, layout, 2, tmp_path)
    low, exact = alone(**model), alone(tied=True)
    assert torch.allclose(found["losses"], exact["losses"], rtol=1e-2, atol=0)
    for name, right in exact.items():
        if name.startswith("gradient."):
            error, usual = (torch.linalg.vector_norm(t[name] - right) for t in (found, low))
            assert error <= 2 * usual, name  # of the slices and their sum: 1.26 was seen


def traffic(told: list) -> int:
    return sum(call["moved"] for rank in told for call in rank["calls"])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_zero_moves_no_more_than_an_all_reduce_and_half_of_it_in_16_bits(
    run_ranks, tmp_path, accumulation
):
    def ranks(dtype: str = "float32", reduce: str = "float32", zero: int = 0) -> list:
        layout = {"dtype": dtype, "reduce": reduce, "accumulation": accumulation}
        return run(run_ranks, {**layout, "parallel": {"zero": zero}}, 4, tmp_path)[1]

    replicas, shards = ranks(), ranks(zero=1)
    low = ranks("bfloat16", "bfloat16", zero=1)
    assert traffic(shards) <= traffic(replicas)
    assert traffic(low) <= 0.55 * traffic(replicas)
    numbers = replicas[0]["all"] // 2
    for rank in replicas:
        ops = [call["op"] for call in rank["calls"]]
        assert set(ops) == {"all_reduce"}
        sums = [call["moved"] for call in rank["calls"] if call["dtype"] == "float32"]
        # Once, however many micro-batches: 2 (N - 1) / N of every gradient's 4 bytes, and padding.
        assert 6 * numbers <= sum(sums) <= 6 * (numbers + 4 * len(sums))
    for rank in shards:
        ops = [call["op"] for call in rank["calls"]]
        buckets = ops.count("reduce_scatter")
        assert ops == ["reduce_scatter"] * buckets + ["all_reduce"] + ["all_gather"] * buckets
        assert buckets > 3


def test_sixteen_bits_on_the_way_cost_only_their_rounding(run_ranks, alone, tmp_path):
    wanted = alone(tied=True)
    for zero in (0, 1):
        layout = {"tied": True, "reduce": "bfloat16", "parallel": {"zero": zero}}
        found, _ = run(run_ranks, layout, 2, tmp_path)
        gradients = {n: t for n, t in found.items() if n.startswith("gradient.")}
        close({**wanted, **gradients, "losses": wanted["losses"]}, wanted, rtol=2**-7)
        assert found["losses"][0] == pytest.approx(float(wanted["losses"][0]), rel=1e-6)
        assert not torch.equal(found["losses"], wanted["losses"])
