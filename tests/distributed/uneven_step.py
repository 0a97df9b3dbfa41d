"""One rank of `test_training.py`: a step on a share of the batch in which targets are ignored.

Prints loss, gradient norm and tokens, which must not depend on the number of ranks.
"""

from __future__ import annotations

import torch

from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.state import new_state
from picotron_core.engine.step import train_step
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import initialise
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.parallel.data import Replicas
from picotron_core.parallel.layout import Layout, shapes_of
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.world import join
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Train


def main() -> None:
    world = join(timeout_s=60)
    architecture = Architecture(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=31,
        initializer_range=0.2,
    )
    wanted = requests(
        architecture,
        device=look("cpu"),
        dtype="float32",
        seq_len=8,
        micro_batch=2,
        document_mask=False,
        training=True,
        world_size=world.size,
    )
    registry = load_registry()
    rules = parse_backends("naive-math", "command line")
    ops, _ = bind(resolve(rules, wanted, registry.candidates), registry)
    cpu = torch.device("cpu")
    ops.comm.start(
        store=world.store, rank=world.rank, world_size=world.size, device=cpu, timeout_s=60
    )
    model = Llama(architecture, ops)
    initialise(model, seed=1)
    mesh = make_mesh(ops.comm, rank=world.rank, world_size=world.size)
    weights = Replicas(model, device=cpu, dtype=torch.float32, axis=mesh.data)
    state = new_state(model, weights, Layout(mesh=mesh, shapes=shapes_of(model)))
    ids = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:2, :7] = IGNORE_INDEX  # 2 of the first half's 16 targets count, all of the other's
    share = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    batch = Batch(inputs=ids[share, :-1].contiguous(), targets=targets[share], doc_ids=None)
    result = train_step(state, [batch], ops, lr=0.1, train=Train(clip=0.0))
    ops.comm.stop()
    print(result.loss, result.grad_norm, result.tokens)


if __name__ == "__main__":
    main()
