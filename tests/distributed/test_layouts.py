"""However the work is divided among ranks, it is the work of one: losses, gradients, weights.

A launch trains a group of layouts one after the other, for to start processes costs more than to
train. `make parity` asks every layout of up to eight ranks that the tiny model admits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("layout_steps.py")
RTOL = 1e-5

Layout = dict[str, Any]
Found = dict[str, Tensor]

# By the number of ranks: each scheme, and products of them.
FEW: dict[int, list[Layout]] = {
    2: [
        {"tied": True, "parallel": {"zero": 1}},
        {"documents": True, "accumulation": 3, "parallel": {"tp": 2, "sequence": True}},
        {
            **{"tied": True, "documents": True, "accumulation": 6},
            "parallel": {"pp": 2, "schedule": "interleaved"},
        },
        {"documents": True, "backends": "mem_efficient;*=auto", "parallel": {"cp": 2}},
    ],
    3: [
        {"documents": True, "accumulation": 2, "parallel": {"zero": 1}},
        {"documents": True, "accumulation": 1, "parallel": {"pp": 3}},
    ],
    8: [
        {
            **{"tied": True, "accumulation": 3},
            "parallel": {"pp": 2, "tp": 2, "sequence": True, "zero": 1},
        },
    ],
    4: [
        {"tied": True, "documents": True, "accumulation": 3},
        {"documents": True, "accumulation": 2, "parallel": {"tp": 2, "zero": 1}},
        {
            **{"tied": True, "documents": True, "accumulation": 3},
            "parallel": {"pp": 4, "schedule": "afab"},
        },
        {"tied": True, "documents": True, "parallel": {"cp": 4, "zero": 1}},
        {"documents": True, "accumulation": 3, "parallel": {"cp": 2, "tp": 2, "sequence": True}},
        {"tied": True, "documents": True, "accumulation": 3, "parallel": {"cp": 2, "pp": 2}},
    ],
}


def degrees_of(world_size: int) -> Iterator[tuple[int, int, int]]:
    """(pp, cp, tp) that divide the ranks, sequences of 48 tokens, and 4 kv heads."""
    for pp, cp, tp in product(range(1, 9), (1, 2, 3, 4, 6, 8), (1, 2, 4)):
        if world_size % (pp * cp * tp) == 0:
            yield pp, cp, tp


def all_of(world_size: int, pp: int, cp: int, tp: int) -> Iterator[Layout]:
    """Every layout of some degrees, with a tied and an untied head and one and three micro-batches.
    Two of these four have packed documents, so that each pair of the three is there.
    """
    schedules = ["1f1b"]
    if pp > 1:
        schedules += ["afab", "interleaved"]
    alike = world_size // (pp * tp)  # ranks of the same weights
    for schedule, zero, sequence, accumulation, tied in product(
        schedules, {0, int(alike > 1)}, {False, tp > 1}, (1, 3), (False, True)
    ):
        interleaved = schedule == "interleaved"
        yield {
            "tied": tied,
            "documents": tied == (accumulation == 1),
            # Micro-batches of an interleaved schedule come in groups of pp: one, or two.
            "accumulation": min(accumulation, 2) * pp if interleaved else accumulation,
            "layers": layers_of(pp, interleaved=interleaved),
            "parallel": {
                **{"pp": pp, "cp": cp, "tp": tp, "schedule": schedule},
                **{"zero": zero, "sequence": sequence},
            },
        }


def layers_of(pp: int, *, interleaved: bool) -> int:
    """As few as show it: two chunks a stage, or stages of unequal length where there are few."""
    if interleaved:
        return 2 * pp
    return pp + 1 if pp < 4 else pp


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layouts" not in metafunc.fixturenames:
        return
    groups = {f"{size}-ranks": (size, layouts) for size, layouts in FEW.items()}
    if metafunc.config.getoption("--all-layouts", default=False):
        groups = {
            f"{size}-ranks-pp{pp}-cp{cp}-tp{tp}": (size, list(all_of(size, pp, cp, tp)))
            for size in range(1, 9)
            for pp, cp, tp in degrees_of(size)
        }
    metafunc.parametrize(("world_size", "layouts"), groups.values(), ids=groups.keys())


def run(
    run_ranks, layouts: list[Layout], world_size: int, folder: Path, **more: Any
) -> list[tuple[Found, list[dict[str, Any]]]]:
    """Of each layout: the tensors, and what each rank has to tell."""
    timeout_s = 120 + 30 * len(layouts)
    arguments = [str(SCRIPT), json.dumps(layouts), str(folder)]
    results = run_ranks(arguments, world_size, timeout_s=timeout_s, **more)
    said = "\n".join(result.stderr[-2000:] for result in results)
    assert not any(result.returncode for result in results), said
    told = zip(*(map(json.loads, result.stdout.splitlines()) for result in results), strict=True)
    return [
        (load_file(folder / f"{number}.safetensors"), list(of_ranks))
        for number, of_ranks in enumerate(told)
    ]


MODEL = (
    "tied",
    "documents",
    "layers",
    "dtype",
    "reduce",
    "backends",
)  # what is no matter of layout


@pytest.fixture(scope="module")
def alone(run_ranks, tmp_path_factory):
    """The runs of one process."""
    kept: dict[str, Found] = {}

    def run_alone(layouts: list[Layout]) -> list[Found]:
        models = [{key: layout[key] for key in MODEL if key in layout} for layout in layouts]
        named = {json.dumps(model): model for model in models}
        missing = {name: model for name, model in named.items() if name not in kept}
        if missing:
            found = run(run_ranks, list(missing.values()), 1, tmp_path_factory.mktemp("alone"))
            kept.update(zip(missing, (tensors for tensors, _ in found), strict=True))
        return [kept[json.dumps(model)] for model in models]

    return run_alone


def differences(found: Found, wanted: Found, rtol: float = RTOL) -> list[str]:
    """What differs, each tensor as a whole: single numbers may be the rest of a cancellation."""
    assert found.keys() == wanted.keys()
    wrong = []
    for name, right in wanted.items():
        error = float(torch.linalg.vector_norm((found[name] - right).double()))
        size = float(torch.linalg.vector_norm(right.double()))
        # Moments are of gradients at weights that already differ in their last digits.
        limit = rtol * (10 if name.startswith("exp_avg") else 1)
        if not error <= limit * size:
            wrong.append(f"{name} by {error / size:.1e}")
    if not torch.allclose(found["losses"], wanted["losses"], rtol=rtol, atol=0):
        wrong.append("losses")
    return wrong


def test_a_layout_trains_the_run_of_one(run_ranks, alone, tmp_path, world_size, layouts):
    wrong = {}
    every = run(run_ranks, layouts, world_size, tmp_path, strangers=world_size > 2)
    for layout, wanted, (found, told) in zip(layouts, alone(layouts), every, strict=True):
        wrong[json.dumps(layout)] = (
            differences(found, wanted) + misfits(layout, told) + strays(told)
        )
    assert {layout: what for layout, what in wrong.items() if what} == {}


def misfits(layout: Layout, told: list[dict[str, Any]]) -> list[str]:
    """What a rank has too much of the optimizer, among those with the same part of the model."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for rank in told:
        alike.setdefault(str(rank["part"]), []).append(rank)
    zero = layout.get("parallel", {}).get("zero", 0)
    return [wrong for part in alike.values() for wrong in misfits_of(part, zero=zero)]


def misfits_of(part: list[dict[str, Any]], *, zero: int) -> list[str]:
    held, whole, ranks = [rank["held"] for rank in part], part[0]["all"], len(part)
    if not zero:
        return [] if held == [whole] * ranks else [f"{held} numbers held, of {whole}"]
    wrong = []
    # every bucket is padded by less than the number of ranks
    if max(held) > -(-whole // ranks) + 60:
        wrong.append(f"a rank holds {max(held)} of {whole} numbers")
    if max(held) > 1.01 * sum(held) / ranks:
        wrong.append(f"unbalanced: {held}")
    if sum(held) != whole:
        wrong.append(f"the ranks hold {sum(held)} of {whole} numbers")
    return wrong


def strays(told: list[dict[str, Any]]) -> list[str]:
    """What ranks hold copies of that are not the same, bit for bit."""
    digests: dict[str, set[str]] = {}
    for rank in told:
        for name, digest in rank["copies"].items():
            digests.setdefault(name, set()).add(digest)
    return [f"copies of {name} differ" for name, of_all in digests.items() if len(of_all) > 1]


SIXTEEN = [
    {"tied": True, "dtype": dtype, "accumulation": 2, "parallel": parallel}
    for dtype in ("bfloat16", "float16")
    for parallel in ({"tp": 2, "sequence": True}, {"pp": 2}, {"zero": 1}, {"cp": 2})
]
ON_THE_WAY = [
    {"tied": True, "reduce": reduce, "parallel": {"zero": zero}}
    for reduce in ("bfloat16", "float16")
    for zero in (0, 1)
]


def test_sixteen_bits_cost_only_their_rounding(run_ranks, alone, tmp_path):
    (exact,) = alone([{"tied": True}])
    every = run(run_ranks, SIXTEEN + ON_THE_WAY, 2, tmp_path)
    for layout, (found, _) in zip(SIXTEEN, every, strict=False):
        (low,) = alone([{"tied": True, "dtype": layout["dtype"]}])
        assert torch.allclose(found["losses"], exact["losses"], rtol=1e-2, atol=0)
        for name, right in exact.items():
            if name.startswith("gradient."):
                error, usual = (torch.linalg.vector_norm(t[name] - right) for t in (found, low))
                assert error <= 2 * usual, name  # of the slices and their sum: 1.26 was seen
    for rank in every[0][1]:  # norms by parts of the tokens are summed once a step, in float32
        sums = [call["dtype"] for call in rank["calls"] if call["op"] == "all_reduce"]
        assert sorted(sums) == ["float32", "float64"]  # the other is the step's own
    for found, _ in every[len(SIXTEEN) :]:
        gradients = {n: t for n, t in found.items() if n.startswith("gradient.")}
        compared = {**exact, **gradients}
        assert differences(compared, exact, rtol=2**-7) == []
        assert found["losses"][0] == pytest.approx(float(exact["losses"][0]), rel=1e-6)
        assert not torch.equal(found["losses"], exact["losses"])


def traffic(told: list) -> int:
    return sum(call["moved"] for rank in told for call in rank["calls"])


def test_zero_moves_no_more_than_an_all_reduce_and_half_of_it_in_16_bits(run_ranks, tmp_path):
    layouts = [
        {"accumulation": accumulation, "steps": 2, **more}
        for accumulation in (1, 3)
        for more in (
            {},
            {"parallel": {"zero": 1}},
            {"dtype": "bfloat16", "reduce": "bfloat16", "parallel": {"zero": 1}},
        )
    ]
    told = [told for _, told in run(run_ranks, layouts, 4, tmp_path)]
    for replicas, shards, low in (told[:3], told[3:]):
        assert traffic(shards) <= traffic(replicas)
        assert traffic(low) <= 0.55 * traffic(replicas)
        numbers = replicas[0]["all"] // 2
        for rank in replicas:
            ops = [call["op"] for call in rank["calls"]]
            assert set(ops) == {"all_reduce"}
            sums = [call["moved"] for call in rank["calls"] if call["dtype"] == "float32"]
            # Once, however many micro-batches: 2 (N - 1) / N of a gradient's 4 bytes, and padding.
            assert 6 * numbers <= sum(sums) <= 6 * (numbers + 4 * len(sums))
        for rank in shards:
            ops = [call["op"] for call in rank["calls"]]
            buckets = ops.count("reduce_scatter")
            assert ops == ["reduce_scatter"] * buckets + ["all_reduce"] + ["all_gather"] * buckets
            assert buckets > 3


def test_a_ring_sends_keys_and_values_unexpanded_and_no_more_than_once_round(run_ranks, tmp_path):
    ((_, told),) = run(run_ranks, [{"steps": 1, "parallel": {"cp": 4}}], 4, tmp_path)
    B, T, K, D, layers, cp = 24, 48, 4, 4, 4, 4
    part = 2 * B * (T // cp) * K * D * 4  # bytes of a rank's keys and values, float32
    for rank in told:
        sent = [call["moved"] for call in rank["calls"] if call["op"] == "send"]
        # Forward and backward pass them on three times, and backward their gradients four.
        assert sum(sent) == layers * (3 + 3 + 4) * part
        assert set(sent) == {part}


def test_the_docs_tell_how_many_layouts_there_are():
    sizes = range(1, 9)
    every = sum(len(list(all_of(size, *degrees))) for size in sizes for degrees in degrees_of(size))
    assert (every, sum(map(len, FEW.values()))) == (840, 13)
    for page in ("README.md", "docs/parallelism.md"):
        text = (Path(__file__).parents[2] / page).read_text()
        assert "840 layouts" in text
        assert "thirteen" in text
