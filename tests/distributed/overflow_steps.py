"""One rank of `test_overflow.py`: float16 steps in which now and then a rank's gradient overflows.

Prints, as JSON, the loss scale after every attempt, the skips, and a digest of the weights. With
one rank the others' shares of the batch are further micro-batches.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.loss_scale import LossScale
from picotron_core.engine.state import new_state
from picotron_core.engine.step import train_step
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import initialise
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.parallel.data import Replicas
from picotron_core.parallel.layout import Layout, shapes_of
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.world import join
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Train

SHARES, B, T, V = 2, 2, 4, 11


def main(attempts: int) -> None:
    world = join(timeout_s=60)
    architecture = Architecture(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=V,
        initializer_range=0.2,
    )
    wanted = requests(
        architecture,
        device=look("cpu"),
        dtype="float16",
        seq_len=T,
        micro_batch=B,
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
    weights = Replicas(model, device=cpu, dtype=torch.float16, axis=mesh.data)
    state = new_state(model, weights, Layout(mesh=mesh, shapes=shapes_of(model)))
    state.loss_scale = LossScale(value=2.0**8, tokens=SHARES * B * T, growth=1)

    struck, poisoned = False, None

    def notice(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal struck
        struck = inputs[0] is poisoned

    def strike(gradient: Tensor) -> Tensor:
        return gradient * torch.inf if struck else gradient

    model.register_forward_pre_hook(notice)
    next(model.parameters()).register_hook(strike)

    # With a half of all attempts struck, and a doubling after each other one, the scale is a random
    # walk; this seed's stays where float16 neither overflows by itself nor loses everything.
    draw = random.Random(459)
    mine = range(SHARES) if world.size == 1 else [world.rank]
    train = Train(clip=0.0)
    scales, skips, struck_in_all = [], [], 0
    for attempt in range(attempts):
        victim = draw.choice([*range(SHARES), *[None] * SHARES])

        def shares(victim: int | None = victim) -> Iterator[Batch]:
            nonlocal poisoned
            for share in mine:
                generator = torch.Generator().manual_seed(state.step * SHARES + share)
                ids = torch.randint(0, V, (B, T + 1), generator=generator)
                inputs = ids[:, :-1].clone()
                poisoned = inputs if share == victim else poisoned
                yield Batch(inputs=inputs, targets=ids[:, 1:].clone(), doc_ids=None)

        result = train_step(state, shares(), ops, lr=1e-3, train=train)
        assert result.skipped == (victim is not None), attempt
        struck_in_all += result.skipped
        scales.append(state.loss_scale.value)
        skips.append(state.loss_scale.skips)
    ops.comm.stop()
    digest = hashlib.sha256()
    for master in state.masters.values():
        digest.update(master.detach().numpy().tobytes())
    answer = {"struck": struck_in_all, "scales": scales, "skips": skips}
    print(json.dumps({**answer, "weights": digest.hexdigest()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
