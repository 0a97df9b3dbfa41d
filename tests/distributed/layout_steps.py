"""One rank of `test_layouts.py`: ten steps of a tiny model in each layout of the JSON argument.

The first rank writes the losses, the gradients of the first step and the last parameters, whole, to
a safetensors file each. With other ranks, or other degrees, they must be the same numbers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from picotron_core.checkpoint.commit import folder_of
from picotron_core.checkpoint.load import open_checkpoint
from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.save import Saver
from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.loss_scale import LossScale
from picotron_core.engine.state import TrainState, new_state
from picotron_core.engine.step import batch_loss, part_of, train_step
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import drawn
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops import Ops
from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.parallel.mesh import Mesh, make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.parallel.piece import whole
from picotron_core.parallel.traffic import NotedComm
from picotron_core.parallel.world import World, join
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Parallel, Train

V, T, STEPS, GLOBAL_BATCH = 61, 48, 10, 24
SKIPPED = 4  # the step whose first try overflows
TOKENS = GLOBAL_BATCH * T
SCALE = LossScale(value=16.0 * TOKENS, tokens=TOKENS, growth=1000)
CPU = torch.device("cpu")


def architecture(*, tied: bool, layers: int) -> Architecture:
    return Architecture(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        vocab_size=V,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )


def bound_ops(model: Architecture, world: World, *, context: int, backends: str) -> Ops:
    wanted = requests(
        model,
        device=look("cpu"),
        dtype="float32",
        seq_len=T,
        micro_batch=2,
        document_mask=True,
        training=True,
        world_size=world.size,
        context=context,
    )
    registry = load_registry()
    rules = parse_backends(backends, "command line")
    ops, _ = bind(resolve(rules, wanted, registry.candidates), registry)
    return ops


def micro_batches(step: int, mesh: Mesh, layout: dict[str, Any]) -> list[Batch]:
    """This rank's part of the step's 24 samples: the same samples in every layout.

    Of some samples no target counts, and of others none of the first and the last quarter: there
    are replicas, micro-batches and parts of sequences without any.
    """
    ids = torch.randint(0, V, (GLOBAL_BATCH, T + 1), generator=torch.Generator().manual_seed(step))
    documents = ((ids[:, :-1] % 7) == 0).int().cumsum(1, dtype=torch.int32)
    ids[::3, 5:9] = 0
    targets = ids[:, 1:].clone()
    targets[12:18] = targets[:6, : T // 4] = targets[:6, -T // 4 :] = IGNORE_INDEX
    mine = torch.arange(GLOBAL_BATCH).tensor_split(mesh.dp.size)[mesh.dp.index]
    accumulation = layout.get("accumulation", 1)
    wholes = [
        Batch(
            inputs=ids[rows, :-1].contiguous(),
            targets=targets[rows],
            doc_ids=documents[rows] if layout.get("documents") else None,
        )
        for rows in mine.tensor_split(accumulation)
    ]
    return [part_of(whole, mesh.cp) for whole in wholes]


def joined(saver: Saver, state: TrainState) -> dict[str, torch.Tensor]:
    """What all ranks hold, whole: through a checkpoint, the one place where it comes together."""
    saver.state = state
    found = open_checkpoint(saver.save())
    return {
        f"{kind}.{name}": found.read(kind, name, whole(prod(shape))).view(shape)
        for kind in found.manifest.kinds
        for name, shape in found.manifest.parameters.items()
    }


def first_gradients(
    state: TrainState, mesh: Mesh, layout: dict[str, Any], saver: Saver
) -> dict[str, torch.Tensor]:
    batches = micro_batches(0, mesh, layout)
    if pipeline := state.layout.pipeline:
        pipeline.train(batches, factor=1.0, expect=lambda last: state.weights.expect(last=last))
    else:
        for number, batch in enumerate(batches):
            state.weights.expect(last=number == len(batches) - 1)
            batch_loss(state, batch).backward()  # type: ignore[no-untyped-call]
    moments = {"gradient": state.weights.gradients()}
    found = joined(saver, replace(state, moments=moments))
    state.weights.drop_gradients()
    return {name: tensor for name, tensor in found.items() if name.startswith("gradient.")}


@dataclass(frozen=True, slots=True)
class Ranks:
    """What the layouts of one launch share."""

    world: World
    comm: NotedComm
    meshes: dict[tuple[int, int, int], Mesh] = field(default_factory=dict)
    bound: dict[tuple[int, str], Ops] = field(default_factory=dict)

    def ops(self, context: int, backends: str) -> Ops:
        """To bind tries each kernel: once will do, for models that ask the same of them."""
        key = context, backends
        if key not in self.bound:
            model = architecture(tied=True, layers=1)
            self.bound[key] = bound_ops(model, self.world, context=context, backends=backends)
        return self.bound[key]

    def mesh(self, degrees: Parallel) -> Mesh:
        pp, cp, tp = key = degrees.pp, degrees.cp, degrees.tp
        if key not in self.meshes:
            rank, size = self.world.rank, self.world.size
            self.meshes[key] = make_mesh(self.comm, rank=rank, world_size=size, pp=pp, cp=cp, tp=tp)
        return self.meshes[key]


def train(layout: dict[str, Any], ranks: Ranks, output: Path) -> dict[str, object]:
    """Ten steps; the first rank writes what came of them. Returns what this rank has to tell."""
    model_of = architecture(tied=bool(layout.get("tied")), layers=layout.get("layers", 4))
    # Buckets of 4000 numbers: several of them, and one that a large parameter has to itself.
    settings = Parallel.model_validate({"bucket_mb": 0.016, **layout.get("parallel", {})})
    backends = layout.get("backends", "naive-math")
    ops = ranks.ops(settings.cp, backends)
    mesh = ranks.mesh(settings)
    with torch.device("meta"):
        model = Llama(model_of, ops)
    first = drawn(model, seed=1)
    dtype = getattr(torch, layout.get("dtype", "float32"))
    reduce = getattr(torch, layout.get("reduce", "float32"))
    weights, parts = parallelize(
        model, settings, mesh, device=CPU, dtype=dtype, values=first, reduce=reduce
    )
    state = new_state(model, weights, parts)
    if ranks.world.size > 1:  # a power of two: other ranks, and other factors, and the same numbers
        state.loss_scale = SCALE
    facts = Facts(data="", eos_id=0, seed=0, global_batch=GLOBAL_BATCH, seq_len=8)
    folder = output.with_suffix("") / "checkpoints"
    folder.parent.mkdir(exist_ok=True)
    saver = Saver(state, folder, facts=facts, keep=2, world=ranks.world)
    tensors = first_gradients(state, mesh, layout, saver)
    losses, norms = [], []
    for step in range(layout.get("steps", STEPS)):
        batches = micro_batches(step, mesh, layout)
        if step == SKIPPED and ranks.world.size > 1:
            skip(state, batches, ops, struck=ranks.world.rank == ranks.world.size - 1)
        ranks.comm.calls.clear()
        # With the default eps of 1e-8 the update of a gradient of nearly 0 is mostly its rounding,
        # and as large as any other: one layout of 8 ranks was 1.5e-5 off in one matrix.
        train = Train(clip=0.05, eps=1e-6)
        result = train_step(state, batches, ops, lr=2e-3, train=train)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights.wait()
    calls = [asdict(call) for call in ranks.comm.calls]
    tensors |= joined(saver, state)
    sizes = [file.stat().st_size for file in sorted(folder_of(folder, state.step).glob("rank-*"))]
    tensors |= {"losses": torch.tensor(losses, dtype=torch.float64)}
    tensors |= {"norms": torch.tensor(norms, dtype=torch.float64)}
    held = sum(moment.numel() for of in state.moments.values() for moment in of.values())
    if ranks.world.is_first:
        save_file(tensors, output)
    return {
        "held": held,
        "all": 2 * sum(parameter.numel() for parameter in state.model.parameters()),
        "part": [mesh.pp.index, mesh.tp.index],
        "calls": calls,
        "files": sizes,
        "copies": copies(state),
    }


def skip(state: TrainState, batches: list[Batch], ops: Ops, *, struck: bool) -> None:
    """An update that nobody makes, for the gradient of one rank overflows."""
    state.loss_scale = replace(SCALE, value=SCALE.tokens * 2.0**200) if struck else SCALE
    assert train_step(state, batches, ops, lr=2e-3, train=Train()).skipped
    state.loss_scale = SCALE


def copies(state: TrainState) -> dict[str, str]:
    """A digest of each parameter, or part of one, by a name that all who have it share."""
    layout = state.layout
    return {
        f"{name} {layout.mesh.tp.index if name in layout.cuts else 0}": sha256(
            parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()[:16]
        for name, parameter in state.model.named_parameters()
    }


def main(layouts: list[dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    world = join(timeout_s=120)
    name = "local" if world.size == 1 else "gloo-cpu"
    candidates = load_registry().candidates
    comm = NotedComm(next(c for c in candidates if c.backend.name == name).backend.load())
    comm.start(store=world.store, rank=world.rank, world_size=world.size, device=CPU, timeout_s=120)
    ranks = Ranks(world, comm)
    for number, layout in enumerate(layouts):
        told = train(layout, ranks, folder / f"{number}.safetensors")
        print(json.dumps(told), flush=True)
    comm.stop()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
