"""float16 with loss scaling: against the float32 step, and against itself by another scale."""

import json
import math
from dataclasses import replace

import pytest
import torch

from picotron_core.checkpoint.load import find_checkpoint, load
from picotron_core.checkpoint.manifest import Facts
from picotron_core.checkpoint.save import Saver
from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.loss_scale import LossScale
from picotron_core.engine.overflow import first_overflow, where_it_began
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
from picotron_core.parallel.pipeline import Pipeline
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Parallel, Train

CPU = torch.device("cpu")
TRAIN = Train(lr=0.01, weight_decay=0.1, clip=0.05)
TOKENS = 2 * 2 * 8  # of two micro-batches


def architecture():
    return Architecture(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=37,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )


def batches(count):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 37, (2, 9), generator=generator)
        made.append(Batch(inputs=ids[:, :-1].clone(), targets=ids[:, 1:].clone(), doc_ids=None))
    return made


def weights(state):
    return {name: master.detach().clone() for name, master in state.masters.items()}


@pytest.fixture(scope="module")
def ops():
    registry = load_registry()
    wanted = requests(
        architecture(),
        device=look("cpu"),
        dtype="float16",
        seq_len=8,
        micro_batch=2,
        document_mask=False,
        training=True,
        world_size=1,
    )
    rules = parse_backends("naive-math", "command line")
    bound, _ = bind(resolve(rules, wanted, registry.candidates), registry)
    return bound


def state_of(ops, dtype=torch.float16, **scale):
    model = Llama(architecture(), ops)
    initialise(model, seed=3)
    mesh = make_mesh(ops.comm, rank=0, world_size=1)
    state = new_state(
        model,
        Replicas(model, device=CPU, dtype=dtype, axis=mesh.data),
        Layout(mesh=mesh, shapes=shapes_of(model)),
    )
    if dtype == torch.float16:
        state.loss_scale = LossScale(**{"value": 2.0**12, "tokens": TOKENS, "growth": 3, **scale})
    return state


def test_the_scale_halves_and_doubles():
    scale = LossScale(value=64.0, tokens=8, growth=2)
    assert scale.factor == 8.0
    once = scale.after_update()
    assert (once.value, once.steps) == (64.0, 1)
    twice = once.after_update()
    assert (twice.value, twice.steps) == (128.0, 0)
    lost = once.after_overflow()
    assert (lost.value, lost.steps, lost.skips) == (32.0, 0, 1)
    assert lost.after_overflow().skips == 2
    assert lost.after_update().skips == 0
    odd = LossScale(value=1000.0, tokens=24, growth=2)
    assert math.log2(odd.factor).is_integer()


def test_a_step_is_the_float32_step_within_float16s_rounding(ops):
    low, exact = state_of(ops), state_of(ops, torch.float32)
    parts = batches(2)
    for _ in range(5):
        found = train_step(low, parts, ops, lr=1e-4, train=TRAIN)
        wanted = train_step(exact, parts, ops, lr=1e-4, train=TRAIN)
        assert found.loss == pytest.approx(wanted.loss, rel=2e-3)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-2)
        assert not found.skipped
    assert low.loss_scale.value == 2.0**13
    assert low.loss_scale.steps == 2


def test_another_scale_gives_the_same_bits(ops):
    """A power of two rounds nothing, as long as nothing leaves float16's normal numbers."""
    one, other = state_of(ops), state_of(ops, value=2.0**14)
    for state in (one, other):
        train_step(state, batches(2), ops, lr=1e-3, train=TRAIN)
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name


def test_without_enough_of_it_gradients_are_lost(ops):
    """What scaling is for: by a scale so low that float16 loses them, the norm is another."""
    right = train_step(state_of(ops), batches(2), ops, lr=0.0, train=TRAIN)
    lost = train_step(state_of(ops, value=2.0**-22), batches(2), ops, lr=0.0, train=TRAIN)
    assert abs(lost.grad_norm / right.grad_norm - 1) > 0.2


def test_an_overflow_changes_nothing_but_the_scale(ops):
    state = state_of(ops, value=2.0**30)
    before, moments = weights(state), {k: dict(v) for k, v in state.moments.items()}
    result = train_step(state, batches(2), ops, lr=1e-2, train=TRAIN)
    assert result.skipped
    assert (state.step, state.tokens, state.loss_scale.value) == (0, 0, 2.0**29)
    for name, weight in weights(state).items():
        assert torch.equal(weight, before[name])
        assert not any(moments[kind][name].any() for kind in moments)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    while result.skipped:
        result = train_step(state, batches(2), ops, lr=1e-2, train=TRAIN)
    assert state.step == 1
    assert state.loss_scale.skips == 0


def test_a_checkpoint_holds_the_scale(ops, tmp_path):
    state = state_of(ops, value=2.0**30)
    for _ in range(40):
        train_step(state, batches(2), ops, lr=1e-3, train=TRAIN)
    facts = Facts(data="key", eos_id=0, seed=0, global_batch=4, seq_len=8)
    Saver(state, tmp_path / "checkpoints", facts=facts, keep=2).save()
    other = state_of(ops)
    load(other, find_checkpoint(tmp_path))
    assert other.loss_scale == state.loss_scale
    for _ in range(3):
        for one in (state, other):
            train_step(one, batches(2), ops, lr=1e-3, train=TRAIN)
    for name, weight in weights(state).items():
        assert torch.equal(weight, weights(other)[name]), name
    exact = state_of(ops, torch.float32)
    load(exact, find_checkpoint(tmp_path))  # a run may go on in another dtype
    assert exact.loss_scale is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.1.mlp.up_proj", "the activation that model.layers.1.mlp.up_proj puts out"),
        ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.v_proj puts out"),
    ],
)
def test_the_first_activation_that_overflows_is_named(ops, name, told):
    state = state_of(ops)
    state.model.get_submodule(name).weight.data.fill_(6e4)
    found = first_overflow(state, batches(2), factor=1.0)
    assert told in found
    assert "micro-batch 0" in found
    assert not any(p.grad is not None for p in state.model.parameters())


@pytest.mark.parametrize("staged", [False, True])
def test_the_micro_batch_in_which_it_happens_is_named(ops, staged):
    state = state_of(ops)
    mesh = state.layout.mesh
    if staged:
        stage = Pipeline(
            model=state.model,
            settings=Parallel(),
            layers=[range(2)],
            down=mesh.pp,
            up=mesh.back,
        )
        state.layout = replace(state.layout, pipeline=stage)
    calls = iter(range(3))
    state.model.get_submodule("model.layers.1.mlp").register_forward_hook(
        lambda _, __, out: out * torch.inf if next(calls) == 1 else out
    )
    found = first_overflow(state, batches(3), factor=1.0)
    assert found.startswith("the activation that model.layers.1.mlp puts out is")
    assert found.endswith("(micro-batch 1)")


def test_what_went_wrong_first_is_told():
    """In forward on the first stage that has it, in backward on the last."""
    up, down = "the gradient of x is NaN", "the activation that x puts out is NaN"
    assert where_it_began(["", ""]) == ""
    assert where_it_began([up, "", up]) == f" On rank 2 {up}."
    assert where_it_began([up, down, down]) == f" On rank 1 {down}."


def test_a_gradient_that_overflows_is_named(ops):
    state = state_of(ops)
    found = first_overflow(state, batches(1), factor=2.0**24)
    assert "the gradient of" in found
    assert first_overflow(state, batches(1), factor=1.0) == ""


def test_a_run_that_cannot_go_on_stops_and_says_where(picotron, tiny, tmp_path):
    low = ("--train.dtype", "float16", "--train.loss_scale", "1e12", "--train.max_skips", "4")
    code, out, err = picotron("train", *tiny, *low, "--name", "lost", "--train.steps", "3")
    assert code == 1
    assert "overflowed 4 times in a row" in err
    assert "the gradient of" in err
    assert "--train.dtype float32" in err
    assert "Traceback" not in err
    assert out.count("overflowed, is tried again") == 3
    lines = (tmp_path / "runs/lost/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [True] * 3


def test_a_run_in_float16_finds_its_scale_and_resumes_bit_by_bit(picotron, tiny, tmp_path):
    low = (
        "--train.dtype",
        "float16",
        "--train.loss_scale",
        "1e12",
        "--train.loss_scale_growth",
        "3",
    )
    whole = ("--name", "whole", "--train.steps", "8", "--checkpoint.every", "5")
    assert picotron("train", *tiny, *low, *whole)[0] == 0

    def records(name):
        text = (tmp_path / "runs" / name / "metrics.jsonl").read_text()
        return [
            {key: line[key] for key in ("step", "loss", "loss_scale", "skipped")}
            for line in map(json.loads, text.splitlines())
            if "loss" in line
        ]

    wanted = records("whole")
    assert sum(line["skipped"] for line in wanted) > 3
    made = [line["step"] for line in wanted if not line["skipped"]]
    assert made == list(range(1, 9))
    path = tmp_path / "runs/whole/checkpoints/step-00000005"
    assert picotron("train", "--resume", str(path))[0] == 0
    assert records("whole") == wanted
