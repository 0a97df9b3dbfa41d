"""One rank of `test_layouts.py`: ten steps of a tiny model in the layout of the JSON argument.

The first rank writes the losses, the gradients of the first step and the last parameters, whole, to
a safetensors file. With another number of ranks, or other degrees, they must be the same numbers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.state import TrainState, new_state
from picotron_core.engine.step import batch_loss, part_of, train_step
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import initialise
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops import Ops
from picotron_core.parallel.mesh import Mesh, make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.parallel.traffic import NotedComm
from picotron_core.parallel.world import World, join
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Parallel, Train

V, T, STEPS, GLOBAL_BATCH = 61, 24, 10, 24
CPU = torch.device("cpu")


def architecture(*, tied: bool) -> Architecture:
    return Architecture(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        vocab_size=V,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )


def bound_ops(model: Architecture, world: World) -> Ops:
    wanted = requests(
        model,
        device=look("cpu"),
        dtype="float32",
        seq_len=T,
        micro_batch=2,
        document_mask=True,
        training=True,
        world_size=world.size,
    )
    registry = load_registry()
    rules = parse_backends("naive-math", "command line")
    ops, _ = bind(resolve(rules, wanted, registry.candidates), registry)
    return ops


def micro_batches(step: int, mesh: Mesh, layout: dict[str, object]) -> list[Batch]:
    """This rank's part of the step's 24 samples: the same samples in every layout."""
    ids = torch.randint(0, V, (GLOBAL_BATCH, T + 1), generator=torch.Generator().manual_seed(step))
    documents = ((ids[:, :-1] % 7) == 0).int().cumsum(1, dtype=torch.int32)
    ids[::3, 5:9] = 0
    mine = torch.arange(GLOBAL_BATCH).chunk(mesh.dp.size)[mesh.dp.index]
    accumulation = int(str(layout.get("accumulation", 1)))
    wholes = [
        Batch(
            inputs=ids[rows, :-1].contiguous(),
            targets=ids[rows, 1:].contiguous(),
            doc_ids=documents[rows] if layout.get("documents") else None,
        )
        for rows in mine.chunk(accumulation)
    ]
    return [part_of(whole, mesh.cp) for whole in wholes]


def first_gradients(
    state: TrainState, mesh: Mesh, layout: dict[str, object]
) -> dict[str, torch.Tensor]:
    batches = micro_batches(0, mesh, layout)
    if pipeline := state.layout.pipeline:
        pipeline.train(batches, factor=1.0, expect=lambda last: state.weights.expect(last=last))
    else:
        for number, batch in enumerate(batches):
            state.weights.expect(last=number == len(batches) - 1)
            batch_loss(state, batch).backward()  # type: ignore[no-untyped-call]
    mine = dict(state.weights.wholes(state.weights.gradients()))
    found = {f"gradient.{name}": whole.clone() for name, whole in state.layout.wholes(mine)}
    state.weights.drop_gradients()
    return found


def main(layout: dict[str, object], output: Path) -> None:
    torch.set_num_threads(1)
    world = join(timeout_s=60)
    model_of = architecture(tied=bool(layout.get("tied")))
    ops = bound_ops(model_of, world)
    noted = NotedComm(ops.comm)
    noted.start(store=world.store, rank=world.rank, world_size=world.size, device=CPU, timeout_s=60)
    degrees = Parallel.model_validate(layout.get("parallel", {}))
    mesh = make_mesh(
        noted,
        rank=world.rank,
        world_size=world.size,
        pp=degrees.pp,
        cp=degrees.cp,
        tp=degrees.tp,
    )
    model = Llama(model_of, ops)
    initialise(model, seed=1)
    # Buckets of 4000 numbers: several of them, and one that a large parameter has to itself.
    settings = Parallel.model_validate({"bucket_mb": 0.016, **dict(layout.get("parallel", {}))})  # type: ignore[call-overload]
    dtype = getattr(torch, str(layout.get("dtype", "float32")))
    reduce = getattr(torch, str(layout.get("reduce", "float32")))
    weights, parts = parallelize(model, settings, mesh, device=CPU, dtype=dtype, reduce=reduce)
    state = new_state(model, weights, parts)
    tensors = first_gradients(state, mesh, layout)
    losses, norms = [], []
    for step in range(STEPS):
        batches = micro_batches(step, mesh, layout)
        noted.calls.clear()
        result = train_step(state, batches, ops, lr=2e-3, train=Train(clip=0.05))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights.wait()
    calls = [asdict(call) for call in noted.calls]
    kept = {kind or "master": 0 for kind, _, _ in state.tensors()}
    assert set(kept) == {"master", "exp_avg", "exp_avg_sq"}
    tensors |= {f"{kind}.{name}": whole.clone() for kind, name, whole in state.tensors()}
    tensors |= {"losses": torch.tensor(losses, dtype=torch.float64)}
    tensors |= {"norms": torch.tensor(norms, dtype=torch.float64)}
    held = sum(moment.numel() for of in state.moments.values() for moment in of.values())
    ops.comm.stop()
    if world.is_first:
        save_file(tensors, output)
    print(json.dumps({"held": held, "all": 2 * model_of.num_parameters, "calls": calls}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
