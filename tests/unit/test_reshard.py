"""Any layout reads what any other wrote, each rank its own numbers and no more.

All ranks of a layout live in this process, one after the other: what they hold is decided by their
place in the mesh, and a checkpoint needs no word between them but that all have written. What is
right is told by the layouts themselves, which cut a whole model without reading any file.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

from picotron_core.checkpoint.commit import commit
from picotron_core.checkpoint.content import content, file_of, manifest_of
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.pieces import held, tensors
from picotron_core.checkpoint.write import write_file
from picotron_core.engine.state import TrainState
from picotron_core.model.architecture import Architecture
from picotron_core.model.llama import Llama
from picotron_core.ops import Ops
from picotron_core.parallel.mesh import Done, make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.schema import Parallel

# Sizes that no degree but 2 and 4 divides; the vocabulary none at all, so that it is filled up.
ARCHITECTURE = Architecture(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=2,
    vocab_size=13,
    tie_word_embeddings=True,
)
KINDS = ("master", "exp_avg", "exp_avg_sq")
FACTS = Facts(data="key", eos_id=0, seed=0, global_batch=4, seq_len=8)
CPU = torch.device("cpu")
OPS = Ops(**{field.name: None for field in fields(Ops)})


class Silent:
    """A comm of ranks that are not there."""

    def new_group(self, ranks):
        return tuple(ranks)

    def all_gather_into_tensor(self, output, tensor, *, group=None, async_op=False):
        return Done()


LAYOUTS = {
    "one": (1, {}),
    "2 replicas": (2, {}),
    "3 replicas": (3, {}),
    "4 replicas": (4, {}),
    "ZeRO of 2": (2, {"zero": 1}),
    "ZeRO of 3": (3, {"zero": 1}),
    "ZeRO of 4": (4, {"zero": 1}),
    "2 slices": (2, {"tp": 2}),
    "4 slices": (4, {"tp": 4}),
    "3 stages": (3, {"pp": 3}),
    "2 stages, interleaved": (2, {"pp": 2, "schedule": "interleaved"}),
    "2 slices of 2 stages, ZeRO of 2": (8, {"pp": 2, "tp": 2, "zero": 1}),
    "2 stages, 3 replicas": (6, {"pp": 2}),
    "ZeRO over dp 2 and cp 2": (4, {"zero": 1, "cp": 2}),
    "2 slices, ZeRO of 3": (6, {"tp": 2, "zero": 1}),
}


@cache
def state_of(layout: str, rank: int) -> TrainState:
    """Every number of the whole model and its moments is another: which went astray is seen."""
    world_size, given = LAYOUTS[layout]
    degrees = {name: given.get(name, 1) for name in ("pp", "cp", "tp")}
    settings = Parallel.model_validate(
        {"bucket_mb": 0.001, **{name: value for name, value in given.items() if name != "cp"}}
    )
    mesh = make_mesh(Silent(), rank=rank, world_size=world_size, **degrees)  # type: ignore[arg-type]
    made = []
    for kind in range(len(KINDS)):
        model = Llama(ARCHITECTURE, OPS)
        first = 1.0 + 10_000 * kind
        with torch.no_grad():
            for parameter in model.parameters():
                values = torch.arange(parameter.numel(), dtype=torch.float32) + first
                parameter.copy_(values.view(parameter.shape))
                first += parameter.numel()
        made.append((model, *parallelize(model, settings, mesh, device=CPU, dtype=torch.float32)))
    (model, weights, parts), *others = made
    moments = {kind: of.masters for kind, (_, of, _) in zip(KINDS[1:], others, strict=True)}
    return TrainState(model=model, weights=weights, layout=parts, moments=moments, step=7, tokens=9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """layout -> the folder of a checkpoint that its ranks wrote."""
    made: dict[str, Path] = {}

    def save(layout: str) -> Path:
        if layout not in made:
            made[layout] = write(layout, tmp_path_factory.mktemp("run") / "checkpoints")
        return made[layout]

    return save


def write(layout: str, checkpoints: Path) -> Path:
    temporary, disk, files = checkpoints / ".writing-", Disk(), {}
    disk.make_folder(checkpoints)
    disk.make_folder(temporary)
    for rank in range(LAYOUTS[layout][0]):
        state = state_of(layout, rank)
        head, numbers = content(state)
        files[file_of(rank)] = write_file(disk, temporary / file_of(rank), head, numbers)
    manifest = manifest_of(state, FACTS).model_copy(update={"files": files})
    final = checkpoints / "step-00000007"
    commit(disk, temporary, final, manifest)
    return final


@pytest.mark.parametrize("before", LAYOUTS)
def test_any_layout_reads_any_other(saved, before):
    checkpoint = open_checkpoint(saved(before))
    for after, (world_size, _) in LAYOUTS.items():
        for rank in range(world_size):
            state = state_of(after, rank)
            pieces = held(state)
            assert pieces.keys() == state.masters.keys()
            for kind, of in tensors(state):
                for name, right in of.items():
                    found = checkpoint.read(kind, name, pieces[name])
                    assert torch.equal(found, right.flatten()), (after, rank, kind, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_written_once_and_the_ranks_write_alike(saved, layout):
    folder = saved(layout)
    sizes = [file.stat().st_size for file in folder.glob("rank-*")]
    numbers = ARCHITECTURE.num_parameters
    header = sum(int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("rank-*"))
    filling = 12 * 3 * ARCHITECTURE.hidden_size * 4  # rows of the vocabulary that are none
    assert sum(sizes) - 8 * len(sizes) - header <= 12 * numbers + filling
    if "stages" not in layout:  # whose first has the embedding
        assert max(sizes) < 1.35 * min(sizes) + 4000
