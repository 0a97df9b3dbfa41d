"""Launches of `test_resharding.py`, each of ranks that are forks of this process.

    python reshard_steps.py FOLDER '{"1": {"one": {}}, "2": {...}}'     layouts by number of ranks

Every layout trains four steps, and saves after the second; then every layout goes on from each of
those checkpoints. Written down: each step's loss, and which samples it read.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from forked import fork_ranks, wait
from layout_steps import architecture, bound_ops

from picotron_core.checkpoint.load import find_checkpoint, load_newest
from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.save import Saver
from picotron_core.data.loader import Batch
from picotron_core.data.tokens import Tokens
from picotron_core.engine import train as engine
from picotron_core.engine.metrics import StepRecord
from picotron_core.engine.state import TrainState, new_state
from picotron_core.model.init import drawn
from picotron_core.model.llama import Llama
from picotron_core.ops import Comm, Ops
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.parallel.world import join
from picotron_core.registry.plugins import load_registry
from picotron_core.schema import Config

SAVED, STEPS, GLOBAL_BATCH, T, V = 2, 4, 12, 48, 61
LIMIT_S = 600  # for the ranks of a launch
CPU = torch.device("cpu")
Layouts = dict[str, dict[str, Any]]


def tokens() -> Tokens:
    """Sixty windows, so that four steps of twelve read each once at most."""
    ids = np.random.default_rng(0).integers(1, V, 60 * T + 1).astype(np.uint16)
    nothing: Any = None
    return Tokens(
        train=ids,
        validation=ids[: 2 * T + 1],
        tokenizer=nothing,
        vocab_size=V,
        eos_id=0,
        bytes_per_token=1.0,
        label="",
        folder=Path(),
        key="key",
    )


def config_of(layout: dict[str, Any], replicas: int) -> Config:
    accumulation = layout.get("accumulation", 1)
    micro_batch = GLOBAL_BATCH // (replicas * accumulation)
    return Config.model_validate(
        {
            "data": {"seq_len": T},
            "parallel": {"bucket_mb": 0.016, **layout.get("parallel", {})},
            "train": {
                **{"steps": STEPS, "micro_batch": micro_batch, "accumulation": accumulation},
                **{"lr": 2e-3, "clip": 0.05, "warmup_steps": 0, "eval_samples": 1},
            },
        }
    )


class Rank:
    """One rank of a launch, whose layouts come one after the other."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.world = folder, join(timeout_s=60)
        self.ops: dict[int, Ops] = {}  # by the degree of cp
        name = "local" if self.world.size == 1 else "gloo-cpu"
        candidates = load_registry().candidates
        self.comm = cast(Comm, next(c for c in candidates if c.backend.name == name).backend.load())
        rank, size = self.world.rank, self.world.size
        self.comm.start(
            store=self.world.store, rank=rank, world_size=size, device=CPU, timeout_s=60
        )

    def train(self, layout: dict[str, Any], *, save: str = "", load: str = "") -> dict[str, Any]:
        """Train to the end, from a checkpoint or from the first step."""
        parallel = config_of(layout, 1).parallel
        rank, size = self.world.rank, self.world.size
        degrees = {"pp": parallel.pp, "cp": parallel.cp, "tp": parallel.tp}
        mesh = make_mesh(self.comm, rank=rank, world_size=size, **degrees)
        model_of = architecture(tied=True, layers=4)
        if parallel.cp not in self.ops:  # to bind tries each kernel
            self.ops[parallel.cp] = bound_ops(
                model_of, self.world, context=parallel.cp, backends="naive-math"
            )
        ops = self.ops[parallel.cp]
        with torch.device("meta"):
            model = Llama(model_of, ops)
        # Another seed where all is to come from a checkpoint.
        values = drawn(model, seed=2 if load else 1)
        weights, parts = parallelize(
            model, parallel, mesh, device=CPU, dtype=torch.float32, values=values
        )
        state = new_state(model, weights, parts)
        if load:
            run = self.folder / load
            load_newest(state, run, find_checkpoint(run, self.world), self.world)
        return self._run(state, config_of(layout, mesh.dp.size), ops, save)

    def _run(self, state: TrainState, config: Config, ops: Ops, save: str) -> dict[str, Any]:
        read: list[list[Any]] = []  # step, and a word for the sample
        losses: dict[int, float] = {}
        make = engine.batch

        def noted(*args: Any, step: int, **given: Any) -> Batch:
            made = make(*args, step=step, **given)
            read.extend([step, str(row)] for row in made.inputs.tolist())
            return made

        engine.batch = noted
        facts = Facts(data="key", eos_id=0, seed=0, global_batch=GLOBAL_BATCH, seq_len=T)
        folder = self.folder / save / "checkpoints"
        folder.parent.mkdir(exist_ok=True)
        saver = Saver(state, folder, facts=facts, keep=2, world=self.world) if save else None
        try:
            for first, *_ in engine.train(
                state,
                config=config,
                tokens=tokens(),
                ops=ops,
                world=self.world,
                flops_per_token=1.0,
                peak_flops=None,
            ):
                assert isinstance(first, StepRecord)
                assert first.loss is not None
                losses[state.step] = first.loss
                if saver and state.step == SAVED:
                    saver.save()
        finally:
            engine.batch = make
        mesh = state.layout.mesh
        if mesh.pp.index or mesh.cp.index or mesh.tp.index:
            read = []  # a rank of the same replica has told
        return {"losses": losses, "read": read, "tokens": state.tokens}


def work(folder: Path, layouts: Layouts, saved: list[str]) -> None:
    """What a rank does in one launch: train and save, or go on from what others saved."""
    rank = Rank(folder)
    told = {}
    for name, layout in layouts.items():
        if not saved:
            told[name] = rank.train(layout, save=name)
        for other in saved:
            told[f"{name} from {other}"] = rank.train(layout, load=other)
    path = folder / f"{rank.world.size}-{'after' if saved else 'before'}-{rank.world.rank}.json"
    path.write_text(json.dumps(told))
    rank.world.leave()
    rank.comm.stop()


def main(folder: Path, by_ranks: dict[str, Layouts]) -> None:
    every = [name for layouts in by_ranks.values() for name in layouts]
    for saved in ([], every):
        for ranks, layouts in by_ranks.items():
            log = folder / "log"
            children = fork_ranks(int(ranks), partial(work, folder, layouts, saved), log)
            end = time.monotonic() + LIMIT_S
            codes = [wait(child, end) for child in children]
            assert codes == [0] * len(children), (codes, log.read_text()[-6000:])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
