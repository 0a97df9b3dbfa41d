"""The module itself: dtypes, devices, the tie, the first weights, the cache, the requests."""

import copy
import statistics
from importlib import import_module

import pytest
import torch

from picotron_core import hardware
from picotron_core.model.architecture import Architecture
from picotron_core.model.embedding import embed
from picotron_core.model.init import initial_value, initialise
from picotron_core.model.kv_cache import empty_cache
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.ops import OPS, Ops
from picotron_core.ops.loss import IGNORE_INDEX

KERNELS = {
    "attention": ("attention", "attention"),
    "norm": ("norm", "rms_norm"),
    "rope": ("rope", "rope"),
    "swiglu": ("swiglu", "swiglu"),
    "loss": ("loss", "loss"),
}


def model_of(*, seed=0, **changes):
    kernels = {
        op: getattr(import_module(f"picotron_backends.naive_math.{module}"), name)
        for op, (module, name) in KERNELS.items()
    }
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    model = Llama(Architecture(**(shape | changes)), Ops(**kernels, optimizer=None, comm=None))
    initialise(model, seed)
    return model


def ids_of(length, batch=2):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def test_the_rotary_tables_stay_float32_when_the_model_is_bfloat16():
    seen = []
    model = model_of()
    for layer in model.model.layers.values():
        rope = layer.self_attn.rope
        layer.self_attn.rope = lambda q, k, cos, sin, rope=rope: (
            seen.append((q.dtype, cos, sin)),
            rope(q, k, cos, sin),
        )[1]
    model(ids_of(9))
    hidden = model.to(torch.bfloat16)(ids_of(9))
    assert hidden.dtype == torch.bfloat16
    first, last = seen[0], seen[-1]
    assert (first[0], last[0]) == (torch.float32, torch.bfloat16)
    assert torch.equal(first[1], last[1])
    assert torch.equal(first[2], last[2])
    assert last[1].dtype == torch.float32


def test_bfloat16_is_the_float32_model_rounded():
    model = model_of(initializer_range=0.1)
    ids, targets = ids_of(16), ids_of(17)[:, 1:]
    exact = model.loss(ids, targets)
    rounded = copy.deepcopy(model).to(torch.bfloat16).loss(ids, targets)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.02 * exact


def test_the_loss_is_a_sum_over_the_targets_that_count():
    model = model_of()
    ids, targets = ids_of(16), ids_of(17)[:, 1:].contiguous()
    targets[1, :10] = IGNORE_INDEX
    logits = model.logits(model(ids)).double()
    expected = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = expected[targets != IGNORE_INDEX].sum()
    torch.testing.assert_close(model.loss(ids, targets).double(), expected, rtol=1e-6, atol=0)
    assert model.loss(ids, torch.full_like(targets, IGNORE_INDEX)) == 0


def test_a_batch_does_not_depend_on_its_neighbours_or_on_what_follows():
    model = model_of(initializer_range=0.2)
    ids = ids_of(16)
    changed = ids.clone()
    changed[0], changed[1, 10:] = 1, 2
    torch.testing.assert_close(model(changed)[1, :10], model(ids)[1, :10])
    assert (model(changed) - model(ids))[1, 10:].abs().max() > 0.1


def test_a_tied_head_is_one_parameter_after_every_move():
    model = model_of()
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(moved.named_parameters())
    with torch.device("meta"):
        empty = model_of()
    built = empty.to_empty(device="cpu")
    assert built.lm_head.weight is built.model.embed_tokens.weight
    initialise(built, 0)
    assert torch.equal(built(ids_of(9)), model(ids_of(9)))


def test_an_untied_head_is_another_parameter():
    model = model_of(tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_too_long_a_sequence_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"65 tokens .* max_position_embeddings = 64"):
        model_of()(ids_of(65))


def test_tables_first_made_in_inference_serve_training():
    model = model_of()
    with torch.inference_mode():
        model(ids_of(16))
    model.loss(ids_of(16), ids_of(16)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_first_weights_depend_on_seed_and_name_alone():
    small, deep = model_of(seed=4), model_of(seed=4, num_hidden_layers=3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = model_of(seed=4)
    assert not torch.equal(torch.get_rng_state(), before)  # torch's own default initialisation
    before = torch.get_rng_state()
    initialise(again, 4)
    assert torch.equal(torch.get_rng_state(), before)
    parameters = dict(deep.named_parameters())
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
        assert torch.equal(parameter, again.get_parameter(name)), name
        drawn = initial_value(name, parameter.shape, std=0.02, seed=4)
        assert torch.equal(parameter, drawn), name
    matrices = [p for p in parameters.values() if p.dim() == 2]
    same = [torch.equal(a, b) for a in matrices for b in matrices if a is not b]
    assert not any(same)
    other = dict(model_of(seed=5).named_parameters())
    assert not any(torch.equal(p, other[n]) for n, p in small.named_parameters() if p.dim() == 2)


def test_first_weights_are_normal_and_norms_are_one():
    model = model_of(hidden_size=256, vocab_size=2000, initializer_range=0.03)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            values = parameter.detach().flatten().double()
            error = 0.03 / len(values) ** 0.5  # standard error of the mean
            assert abs(values.mean()) < 5 * error, name
            assert abs(values.std() - 0.03) < 5 * error, name
            inside = (values.abs() < 0.03 * statistics.NormalDist().inv_cdf(0.75)).double().mean()
            assert abs(inside - 0.5) < 5 * 0.5 / len(values) ** 0.5, name


def test_the_cache_gives_views_of_one_allocation():
    architecture = model_of().architecture
    cache = empty_cache(
        architecture, batch=1, max_len=6, device=torch.device("cpu"), dtype=torch.float32
    )
    k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    cache.append(0, k, v)
    assert cache.length == 0  # the second layer has nothing yet
    cache.append(1, 2 * k, 2 * v)
    assert (cache.length, cache.max_len) == (4, 6)
    one = torch.randn(1, 2, 1, 8)
    keys, values = cache.append(1, one, -one)
    assert torch.equal(keys, torch.cat([2 * k, one], dim=2))
    assert torch.equal(values, torch.cat([2 * v, -one], dim=2))
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    with pytest.raises(ValueError, match="7 tokens do not fit a KV cache of max_len=6"):
        cache.append(1, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="inference"):
        cache.append(0, one.requires_grad_(), one)


def test_a_cache_with_doc_ids_is_refused():
    model = model_of()
    cache = empty_cache(
        model.architecture, batch=2, max_len=6, device=torch.device("cpu"), dtype=torch.float32
    )
    with pytest.raises(ValueError, match="doc_ids"):
        model(ids_of(4), doc_ids=torch.zeros(2, 4, dtype=torch.int64), cache=cache)


def asked(*, training, document_mask=False, **changes):
    return requests(
        model_of(**changes).architecture,
        device=hardware.profile("cpu"),
        dtype="bfloat16",
        seq_len=32,
        micro_batch=4,
        document_mask=document_mask,
        training=training,
        world_size=2,
    )


def test_training_asks_once_for_each_op():
    by_op = {request.op: request for request in asked(training=True, document_mask=True)}
    assert set(by_op) == set(OPS)
    assert by_op["attention"].features == {"causal", "gqa", "doc_ids"}
    assert by_op["attention"].sizes == {"B": 4, "H": 8, "K": 2, "T": 32, "S": 32, "D": 8}
    assert by_op["norm"].sizes["E"] == 64
    assert by_op["loss"].sizes == {"N": 128, "E": 64, "V": 97}
    assert by_op["comm"].sizes["world"] == 2
    assert by_op["optimizer"].dtype == "float32"
    assert {by_op[op].dtype for op in ("attention", "norm", "rope", "swiglu", "loss")} == {
        "bfloat16"
    }
    assert all(request.training for request in by_op.values())


def test_generation_asks_for_one_query_against_many_keys():
    found = asked(training=False, num_key_value_heads=8)
    assert [request.op for request in found].count("attention") == 2
    assert {request.op for request in found} == {"attention", "norm", "rope", "swiglu"}
    assert not any(request.training for request in found)
    whole, step = (request for request in found if request.op == "attention")
    assert whole.features == {"causal"}
    assert step.features == {"causal", "cross_length"}
    assert (step.sizes["T"], step.sizes["S"]) == (1, 32)


def test_a_frequent_tokens_gradient_is_summed_in_float32():
    """1000 times the same token with a gradient of 1: a bfloat16 running sum stalls at 256."""
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    out = embed(torch.ones(1, 1000, dtype=torch.int64), weight)
    assert out.shape == (1, 1000, 2)
    out.backward(torch.ones_like(out))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 0], [1000, 1000], [0, 0]]


def test_each_module_says_what_it_reads_and_a_tied_head_not_before_it_is_needed():
    def reads(model):
        names = {module: name for name, module in model.named_modules()}
        return {names[module]: parameters for module, parameters in model.reads().items()}

    whole = reads(model_of())
    assert whole["model"] == ["model.embed_tokens.weight"]
    assert whole["model.norm"] == ["model.norm.weight"]
    assert len(whole["model.layers.1"]) == 9
    last = model_of()
    last.keep([1], embedding=False, head=True)
    assert reads(last)["model"] == []
    assert reads(last)["model.norm"] == ["model.embed_tokens.weight", "model.norm.weight"]
