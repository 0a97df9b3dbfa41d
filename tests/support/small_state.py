"""A state that takes no time: what the tests of checkpoints save, here and in children."""

import torch
from picotron_backends.one_process import COMM

from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.save import Saver
from picotron_core.engine.state import TrainState
from picotron_core.parallel.data import Replicas
from picotron_core.parallel.layout import Layout, shapes_of
from picotron_core.parallel.mesh import make_mesh

FACTS = Facts(data="key", eos_id=0, seed=0, global_batch=4, seq_len=8)


def state_at(step, size=64, comm=COMM, rank=0, ranks=1) -> TrainState:
    """Tensors that tell their step; a checkpoint needs no more of a model than its parameters.
    Of several ranks each has all of it, and writes its part.
    """
    model = torch.nn.Linear(size, 3, bias=False)
    torch.nn.init.constant_(model.weight, float(step))
    mesh = make_mesh(comm, rank=rank, world_size=ranks)
    weights = Replicas(model, device=torch.device("cpu"), dtype=torch.float32, axis=mesh.data)
    moments = {
        name: {"weight": torch.full((3, size), step + shift)}
        for shift, name in ((0.25, "exp_avg"), (0.5, "exp_avg_sq"))
    }
    return TrainState(
        model=model,
        weights=weights,
        layout=Layout(mesh=mesh, shapes=shapes_of(model)),
        moments=moments,
        step=step,
        tokens=10 * step,
    )  # type: ignore[arg-type]


def saver(state, run, keep=9, **more) -> Saver:
    run.mkdir(exist_ok=True)
    return Saver(state, run / "checkpoints", facts=FACTS, keep=keep, pause_s=0.0, **more)


def save_at(step, run, keep=9, **more):
    return saver(state_at(step), run, keep, **more).save()
