"""`picotron plan` for every layout: what it foretells against what a rank really allocates.

One rank trains for real, among others that are imagined: what it holds does not depend on what they
say. What a transport has for itself is not in it, but for the slices of a sum that is divided.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from picotron_conformance.launched import peak_bytes

from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine import memory
from picotron_core.engine.kernel_memory import COUNTED, DIVIDED, Work, counted_as
from picotron_core.engine.stages import counted_stages
from picotron_core.engine.state import new_state
from picotron_core.engine.step import part_of, train_step
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import drawn
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops import Ops
from picotron_core.parallel.mesh import Done, make_mesh
from picotron_core.parallel.parallelize import parallelize
from picotron_core.parallel.tensor import slice_of
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Parallel, Train

CPU = torch.device("cpu")
TOLERANCE = 0.03  # the promise is 0.15


class Slices:
    """What the others send, for which gloo-cpu has memory until it is waited for."""

    def __init__(self, tensor):
        self.tensor = tensor

    def wait(self):
        self.tensor = None


class Imagined:
    """A `comm` without others: whatever they would say is what this rank says, or small."""

    def new_group(self, ranks):
        return tuple(ranks)

    def all_reduce(self, tensor, **_):
        if tensor.dtype == torch.float64:  # the step's sums: the last stage has seen tokens
            tensor.add_(1)
        return Done()

    def all_gather_into_tensor(self, output, tensor, **_):
        output.view(-1, *tensor.shape).copy_(tensor)
        return Done()

    def reduce_scatter_tensor(self, output, tensor, **_):
        output.copy_(tensor.view(-1, *output.shape)[0])
        return Slices(torch.zeros_like(tensor))

    def broadcast(self, tensor, **_):
        return Done()

    def send(self, tensor, **_):
        return Done()

    def recv(self, tensor, **_):
        tensor.fill_(0.01)
        return Done()


SHAPES = {  # dominated by activations, by the vocabulary, by the weights; tied or not
    "deep": ({"E": 128, "F": 352, "L": 6, "V": 256, "tied": True}, 1, 512),
    "vocabulary": ({"E": 64, "F": 176, "L": 2, "V": 16384, "tied": False}, 1, 128),
    "chunks": ({"E": 64, "F": 176, "L": 2, "V": 16384, "tied": False}, 1, 1024),
    "weights": ({"E": 384, "F": 1024, "L": 4, "V": 2048, "tied": True}, 1, 32),
}


def work_of(shape, parallel, *, ranks, accumulation, dtype, reduce="float32"):
    sizes, micro_batch, seq_len = SHAPES[shape]
    whole = Architecture(
        hidden_size=sizes["E"],
        intermediate_size=sizes["F"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes["E"] // 4,
        vocab_size=sizes["V"],
        tie_word_embeddings=sizes["tied"],
    )
    parallel = Parallel.model_validate({"bucket_mb": 0.5, **parallel})
    work = Work(
        architecture=slice_of(whole, parallel.tp),
        device=look("cpu"),
        dtype=dtype,
        seq_len=seq_len // parallel.cp,
        micro_batch=micro_batch,
        accumulation=accumulation,
        reduce_dtype=reduce,
        replicas=ranks // parallel.pp // parallel.tp,
        parallel=parallel,
    )
    asked = requests(
        whole,
        device=work.device,
        dtype=dtype,
        seq_len=seq_len,
        context=parallel.cp,
        micro_batch=micro_batch,
        document_mask=False,
        training=True,
        world_size=1,
    )
    selected = resolve(parse_backends("*=auto", "test"), asked, load_registry().candidates)
    kernels = {op: counted_as(op, selected[op].chosen) for op in COUNTED}
    if parallel.tp > 1:
        kernels["loss"] = DIVIDED
    ops = Ops(**{op: selection.chosen.backend.load() for op, selection in selected.items()})
    return replace(work, kernels=kernels), whole, replace(ops, comm=Imagined())


def measured_peak(work, whole, ops, stage):
    """Of the whole life of a rank: its start, and two steps."""
    degrees = work.parallel
    ranks = work.replicas * degrees.pp * degrees.tp
    rank = stage * degrees.cp * degrees.tp

    def batches():
        generator = torch.Generator().manual_seed(0)
        shape = (work.micro_batch, work.seq_len * degrees.cp + 1)
        for _ in range(work.accumulation):
            ids = torch.randint(0, whole.vocab_size, shape, generator=generator)
            batch = Batch(inputs=ids[:, :-1].clone(), targets=ids[:, 1:].clone(), doc_ids=None)
            yield part_of(batch, mesh.cp)

    mesh = make_mesh(
        ops.comm, rank=rank, world_size=ranks, pp=degrees.pp, cp=degrees.cp, tp=degrees.tp
    )

    def train():
        dtype, reduce = getattr(torch, work.dtype), getattr(torch, work.reduce_dtype)
        with torch.device("meta"):
            model = Llama(whole, ops)
        weights, layout = parallelize(
            model,
            degrees,
            mesh,
            device=CPU,
            dtype=dtype,
            values=drawn(model, 0),
            reduce=reduce,
        )
        state = new_state(model, weights, layout)
        for _ in range(2):
            train_step(state, batches(), ops, lr=1e-4, train=Train())
        weights.wait()

    return peak_bytes(train, CPU)


@pytest.mark.parametrize(
    ("shape", "parallel", "ranks", "accumulation", "dtype"),
    [
        ("weights", {}, 2, 1, "float32"),
        ("weights", {"zero": 1}, 2, 1, "float32"),
        ("weights", {"zero": 1}, 8, 1, "bfloat16"),
        ("deep", {"zero": 1}, 4, 3, "float32"),
        ("deep", {"tp": 2}, 2, 1, "float32"),
        ("deep", {"tp": 2, "sequence": True}, 2, 1, "float32"),
        ("vocabulary", {"tp": 2, "zero": 1}, 4, 1, "bfloat16"),
        ("chunks", {"tp": 2}, 2, 1, "float32"),
        ("deep", {"pp": 2}, 2, 4, "float32"),
        ("vocabulary", {"pp": 2, "schedule": "afab"}, 2, 3, "float32"),
        ("weights", {"pp": 2, "zero": 1}, 4, 4, "bfloat16"),
        ("deep", {"pp": 3, "schedule": "interleaved"}, 3, 3, "float32"),
        ("deep", {"cp": 2}, 2, 1, "float32"),
        ("weights", {"pp": 2, "cp": 2, "tp": 2, "sequence": True, "zero": 1}, 8, 4, "float32"),
    ],
)
def test_the_peak_of_a_rank_of_any_layout(shape, parallel, ranks, accumulation, dtype):
    work, whole, ops = work_of(shape, parallel, ranks=ranks, accumulation=accumulation, dtype=dtype)
    moments = memory.timeline(work)
    for stage in sorted({0, work.parallel.pp - 1}):
        foretold = max((m for m in moments if m.stage == stage), key=lambda m: m.total)
        measured = measured_peak(work, whole, ops, stage)
        assert measured > 4 * 2**20  # tensors, not trifles
        assert foretold.total == pytest.approx(measured, rel=TOLERANCE), foretold
    assert memory.peak(work).total == max(moment.total for moment in moments)


def test_gradients_that_travel_in_16_bits_take_no_more_than_in_32():
    def peaks(reduce):
        work, *more = work_of(
            "weights", {}, ranks=2, accumulation=1, dtype="float32", reduce=reduce
        )
        return memory.peak(work).total, measured_peak(work, *more, 0)

    for wide, narrow in zip(peaks("float32"), peaks("bfloat16"), strict=True):
        assert narrow <= 1.01 * wide


def test_what_a_stage_has_at_once():
    """Against the schedules as they are drawn in their files."""

    def stages(schedule, accumulation, pp=4):
        settings = Parallel(pp=pp, schedule=schedule)
        return [s.in_flight for s in counted_stages(settings, 8, accumulation)]

    assert stages("afab", 6) == [6, 6, 6, 6]
    assert stages("1f1b", 6) == [4, 3, 2, 1]
    assert stages("1f1b", 2) == [2, 2, 2, 1]
    assert stages("interleaved", 2, pp=2) == [2, 1.5]  # chunks: F0 F1 F0' F1' B...; F0 F1 F0' B0'
    ends = [(s.embedding, s.head) for s in counted_stages(Parallel(pp=3), 7, 1)]
    assert ends == [(True, False), (False, False), (False, True)]
    assert [s.layers for s in counted_stages(Parallel(pp=3), 7, 1)] == [3, 2, 2]
