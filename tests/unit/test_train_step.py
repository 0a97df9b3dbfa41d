"""One step against an independent one: float64 autograd of the mean loss and torch's own AdamW."""

import math

import pytest
import torch

from picotron_core.config import parse_backends
from picotron_core.data.loader import Batch
from picotron_core.engine.state import new_state
from picotron_core.engine.step import decays, evaluate, train_step
from picotron_core.errors import RunError
from picotron_core.hardware import look
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import initialise
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops.loss import IGNORE_INDEX
from picotron_core.parallel.data import Replicas
from picotron_core.parallel.layout import Layout, shapes_of
from picotron_core.parallel.mesh import make_mesh
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import resolve
from picotron_core.schema import Train

CPU = torch.device("cpu")


def architecture(tied=True):
    return Architecture(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=37,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def ops():
    registry = load_registry()
    wanted = requests(
        architecture(),
        device=look("cpu"),
        dtype="float32",
        seq_len=8,
        micro_batch=2,
        document_mask=False,
        training=True,
        world_size=1,
    )
    rules = parse_backends("naive-math", "command line")
    bound, _ = bind(resolve(rules, wanted, registry.candidates), registry)
    return bound


def model_of(ops, tied=True):
    model = Llama(architecture(tied), ops)
    initialise(model, seed=3)
    return model


def state_of(ops, tied=True, dtype=torch.float32):
    model = model_of(ops, tied)
    mesh = make_mesh(ops.comm, rank=0, world_size=1)
    return new_state(
        model,
        Replicas(model, device=CPU, dtype=dtype, axis=mesh.data),
        Layout(mesh=mesh, shapes=shapes_of(model)),
    )


def batches(count, seed=0, ignored=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(0, 37, (2, 9), generator=generator)
        targets = ids[:, 1:].clone()
        # An uneven number of valid tokens: a mean of means would be another number.
        targets[0, : ignored * (number + 1)] = IGNORE_INDEX
        made.append(Batch(inputs=ids[:, :-1].clone(), targets=targets, doc_ids=None))
    return made


def joined(parts):
    return Batch(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        doc_ids=None,
    )


def mean_loss(model, batch):
    """Not the engine's path: whole logits, torch's own cross-entropy, and its mean."""
    logits = model.logits(model(batch.inputs))
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX
    )


def weights(state):
    return {name: master.detach().clone() for name, master in state.masters.items()}


TRAIN = Train(lr=0.01, weight_decay=0.1, clip=0.05, beta1=0.9, beta2=0.95, eps=1e-8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("clip", [0.05, 0.0, 1e9])
def test_steps_equal_torchs_adamw_on_the_mean_loss(ops, tied, clip):
    train = Train(**{**TRAIN.model_dump(), "clip": clip})
    state, other = state_of(ops, tied), model_of(ops, tied)
    named = dict(other.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decays(n, p)], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        parts = batches(3, seed=step, ignored=2)
        result = train_step(state, parts, ops, lr=0.01, train=train)
        optimizer.zero_grad()
        loss = mean_loss(other, joined(parts))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), clip or math.inf)
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert result.tokens == int((joined(parts).targets != IGNORE_INDEX).sum())
    for name, master in state.masters.items():
        torch.testing.assert_close(master, named[name], rtol=2e-4, atol=2e-5, msg=name)
    assert state.step == 4


def test_accumulation_equals_one_large_batch(ops):
    """With uneven counts of valid tokens: the one global division is what makes them equal."""
    parts = batches(3, ignored=2)
    whole, split = state_of(ops), state_of(ops)
    train_step(whole, [joined(parts)], ops, lr=0.01, train=TRAIN)
    train_step(split, parts, ops, lr=0.01, train=TRAIN)
    for name in whole.masters:
        torch.testing.assert_close(split.masters[name], whole.masters[name], rtol=1e-4, atol=1e-6)


def test_weight_decay_spares_norms_and_embeddings(ops):
    names = {
        name: decays(name, master) for name, master in state_of(ops, tied=False).masters.items()
    }
    spared = {name for name, decay in names.items() if not decay}
    assert spared == {name for name in names if "norm" in name or "embed" in name}
    assert names["lm_head.weight"]
    assert "lm_head.weight" not in state_of(ops, tied=True).masters


def test_bfloat16_computes_low_and_updates_float32_masters(ops):
    state, exact = state_of(ops, dtype=torch.bfloat16), state_of(ops)
    start = weights(exact)
    for step in range(3):
        parts = batches(2, seed=step)
        low = train_step(state, parts, ops, lr=1e-4, train=TRAIN)
        high = train_step(exact, parts, ops, lr=1e-4, train=TRAIN)
        assert low.loss == pytest.approx(high.loss, rel=2e-2)
        assert low.loss != high.loss
    parameters = dict(state.model.named_parameters())
    for name, master in state.masters.items():
        assert master.dtype == torch.float32
        assert parameters[name].dtype == torch.bfloat16
        assert parameters[name].grad is None
        assert torch.equal(parameters[name], master.bfloat16()), name
        # Updates of 1e-4 vanish in bfloat16 weights of size 1; the masters keep them.
        assert not torch.equal(master, start[name])
    updates = torch.cat([(state.masters[n] - start[n]).flatten() for n in start])
    wanted = torch.cat([(exact.masters[n] - start[n]).flatten() for n in start])
    assert torch.nn.functional.cosine_similarity(updates, wanted, dim=0) > 0.98


def test_low_precision_gradients_are_summed_in_float32(ops):
    """300 equal micro-batches: a bfloat16 running sum stalls at 256 times its addend."""
    state, once = state_of(ops, dtype=torch.bfloat16), state_of(ops, dtype=torch.bfloat16)
    (part,) = batches(1)
    many = train_step(state, [part] * 300, ops, lr=0.01, train=TRAIN)
    one = train_step(once, [part], ops, lr=0.01, train=TRAIN)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update(ops):
    state = state_of(ops)
    state.masters["model.norm.weight"].data[0] = math.nan
    before = weights(state)
    with pytest.raises(RunError, match=r"The loss is nan .* at step 1\. .*Lower train\.lr"):
        train_step(state, batches(1), ops, lr=0.01, train=TRAIN)
    assert state.step == 0
    for name, master in state.masters.items():
        assert torch.equal(master, before[name]) or name == "model.norm.weight"


def test_a_parameter_without_gradient_is_named(ops):
    state = state_of(ops)
    state.masters["model.norm.weight"].requires_grad_(False)
    with pytest.raises(RunError, match=r"model\.norm\.weight got no gradient"):
        train_step(state, batches(1), ops, lr=0.01, train=TRAIN)


def test_evaluation_is_the_mean_over_all_tokens_and_changes_nothing(ops):
    state = state_of(ops)
    before = weights(state)
    parts = batches(3, ignored=2)
    found = evaluate(state, parts)
    assert found == pytest.approx(mean_loss(state.model, joined(parts)).item(), rel=1e-5)
    assert all(torch.equal(master, before[name]) for name, master in state.masters.items())
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_every_look_at_the_devices_numbers_is_watched(ops, monkeypatch):
    """On a GPU it is there that a rank waits for one that is lost."""
    state = state_of(ops)
    dog = state.layout.mesh.world.watchdog
    watched = []

    def noted(look):
        def look_at(tensor):
            watched.append(dog._waits is not None)
            return look(tensor)

        return look_at

    for name in ("tolist", "item", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    train_step(state, batches(2), ops, lr=0.1, train=Train())
    evaluate(state, batches(2))
    assert watched == [True, True]
