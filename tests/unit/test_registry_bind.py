"""Binding: the kernel itself is bound, and what fails to load or to compute is passed over."""

import logging

import pytest
import torch

from picotron_core.config import parse_backends
from picotron_core.errors import BackendError
from picotron_core.hardware import look
from picotron_core.registry import (
    Backend,
    Candidate,
    Code,
    Kernel,
    Level,
    Provider,
    Request,
)
from picotron_core.registry.bind import bind
from picotron_core.registry.plugins import Registry, load_registry
from picotron_core.registry.probe import CASES, probe
from picotron_core.registry.select import resolve

ACME = Provider(plugin="acme", distribution="acme-kernels", version="2.0")
NORM = Request(op="norm", device=look("cpu"), dtype="float32", sizes={"E": 32})


def rms_norm(x, weight, *, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def without_eps_and_order(x, weight, *, eps):
    return x / x.abs().mean(-1, keepdim=True) * weight


def without_weight_gradient(x, weight, *, eps):
    return rms_norm(x, weight.detach(), eps=eps)


def with_nan(x, weight, *, eps):
    return rms_norm(x, weight, eps=eps) * torch.nan


def without_eps(x, weight, *, eps):
    return rms_norm(x, weight, eps=1e-9)


def always_float64(x, weight, *, eps):
    return rms_norm(x, weight, eps=eps).double()


def raising(x, weight, *, eps):
    raise RuntimeError("no kernel image is available")


def only_forward(x, weight, *, eps):
    return rms_norm(x, weight, eps=eps).detach()


def registry_with(kernel: Kernel, level=Level.SPECIALIZED) -> Registry:
    """The bundled backends and one more, `acme/mine`, that loads `kernel`."""
    bundled = load_registry()
    mine = Backend(op="norm", name="mine", level=level, load=lambda: kernel, supports=lambda _: ())
    extra = Candidate(backend=mine, provider=ACME)
    return Registry((*bundled.candidates, extra), bundled.plugins, bundled.manager)


def bind_norm(registry: Registry, wish=""):
    rules = parse_backends(wish, "command line")
    return bind(resolve(rules, [NORM], registry.candidates), registry)


def test_the_bound_op_is_the_kernel():
    ops, (selection,) = bind_norm(registry_with(rms_norm))
    assert ops.norm is rms_norm
    assert selection.chosen.qualified_name == "acme/mine"


@pytest.mark.parametrize(
    "kernel",
    [
        without_eps,
        always_float64,
        without_eps_and_order,
        without_weight_gradient,
        with_nan,
        raising,
        only_forward,
    ],
)
def test_auto_passes_over_a_kernel_that_fails_its_trial(kernel, caplog):
    with caplog.at_level(logging.WARNING, "picotron"):
        ops, (selection,) = bind_norm(registry_with(kernel))
    assert ops.norm is not kernel
    assert selection.chosen.provider.bundled
    refusal = selection.refused[-1]
    assert refusal.candidate.qualified_name == "acme/mine"
    assert refusal.reasons[0].code is Code.PROBE_FAILED
    assert "acme/mine is not used" in caplog.text


def test_a_kernel_asked_for_by_name_is_never_swapped():
    with pytest.raises(BackendError, match=r"no kernel image.*--backends norm=auto"):
        bind_norm(registry_with(raising), "norm=acme/mine")


def test_loading_that_raises_is_a_reason():
    registry = registry_with(rms_norm)
    broken = Candidate(
        backend=Backend(
            op="norm",
            name="broken",
            level=Level.SPECIALIZED,
            load=lambda: __import__("a_module_that_is_not_there"),
            supports=lambda _: (),
        ),
        provider=ACME,
    )
    registry = Registry((broken, *registry.candidates), registry.plugins, registry.manager)
    ops, (selection,) = bind_norm(registry)
    assert ops.norm is rms_norm
    assert selection.refused[-1].reasons[0].code is Code.IMPORT_FAILED
    with pytest.raises(BackendError, match="a_module_that_is_not_there"):
        bind_norm(registry, "norm=broken")


def correct(q, k, v, *, causal, doc_ids=None, offset=None, query_doc_ids=None, return_lse=False):
    """A right kernel; each of those below differs from it in one way."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    T, S = q.shape[2], k.shape[2]
    first = S - T if offset is None else offset
    sees = torch.ones(T, S, dtype=torch.bool).tril(first)[None, None]
    if doc_ids is not None:
        own = doc_ids[:, first : first + T] if query_doc_ids is None else query_doc_ids
        sees = sees & (own[:, None, :, None] == doc_ids[:, None, None, :])
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~sees, -torch.inf)
    out = logits.softmax(-1).masked_fill(~sees, 0) @ v
    return (out, logits.logsumexp(-1)) if return_lse else out


def with_groups_in_turn(q, k, v, **arguments):
    groups = q.shape[1] // k.shape[1]
    return correct(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), **arguments)


def with_the_first_rows_documents(q, k, v, *, doc_ids=None, **arguments):
    return correct(q, k, v, doc_ids=None if doc_ids is None else doc_ids[:1], **arguments)


def standing_at_the_end(q, k, v, *, offset=None, **arguments):
    return correct(q, k, v, **arguments)


def with_the_keys_documents(q, k, v, *, query_doc_ids=None, **arguments):
    return correct(q, k, v, **arguments)


def with_an_lse_of_nothing_seen(q, k, v, **arguments):
    out, lse = correct(q, k, v, **arguments)
    return out, lse.clamp(min=-1e30)


def as_if_contiguous(q, k, v, **arguments):
    return correct(
        *(t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in (q, k, v)), **arguments
    )


def in_base_two(q, k, v, *, return_lse=False, **arguments):
    if not return_lse:
        return correct(q, k, v, **arguments)
    out, lse = correct(q, k, v, return_lse=True, **arguments)
    return out, lse / 0.6931471805599453


def that_clears_its_input(q, k, v, **arguments):
    out = correct(q, k, v, **arguments)
    v.data.zero_()
    return out


def in_float64(q, k, v, **arguments):
    out = correct(q, k, v, **arguments)
    return (out[0].double(), out[1]) if isinstance(out, tuple) else out.double()


def aligned_top_left(q, k, v, **arguments):
    if q.shape[2] == 1:  # only what decoding asks for is wrong
        return v[:, :1, :1].expand(q.shape[0], q.shape[1], 1, -1)
    return correct(q, k, v, **arguments)


def attention_request(*features, **sizes):
    letters = {"H": 4, "K": 2, "D": 16, "T": 64, "S": 64, **sizes}
    return Request(
        op="attention",
        device=look("cpu"),
        dtype="float32",
        features=frozenset(features),
        sizes=letters,
    )


@pytest.mark.parametrize(
    ("kernel", "request_"),
    [
        (with_groups_in_turn, attention_request("causal", "gqa")),
        (with_the_first_rows_documents, attention_request("causal", "gqa", "doc_ids")),
        (as_if_contiguous, attention_request("causal", "gqa")),
        (in_base_two, attention_request("causal", "lse")),
        (that_clears_its_input, attention_request("causal")),
        (in_float64, attention_request("causal")),
        (aligned_top_left, attention_request("causal", "cross_length", T=1)),
        (standing_at_the_end, attention_request("causal", "offset")),
        (standing_at_the_end, attention_request("causal", "cross_length", "offset")),
        (with_the_keys_documents, attention_request("causal", "doc_ids", "query_doc_ids")),
        (with_an_lse_of_nothing_seen, attention_request("causal", "offset", "lse")),
    ],
)
def test_the_trial_sees_a_wrong_attention(kernel, request_):
    (reference,) = (
        c.backend.load()
        for c in load_registry().candidates
        if (c.backend.op, c.backend.name) == ("attention", "naive-math")
    )
    assert probe(correct, reference, request_) is None
    reason = probe(kernel, reference, request_)
    assert reason is not None
    assert reason.code is Code.PROBE_FAILED


def test_the_trial_asks_for_the_sizes_of_the_request():
    """A kernel that its own `supports` limits to multiples of 8 is not tried on another size."""

    def swiglu(gate, up):
        if gate.shape[-1] % 8:
            raise ValueError("F must be a multiple of 8")
        return torch.nn.functional.silu(gate) * up

    request = Request(op="swiglu", device=look("cpu"), dtype="float32", sizes={"F": 40})
    assert probe(swiglu, lambda g, u: torch.sigmoid(g) * g * u, request) is None


def test_an_op_that_was_not_requested_says_so():
    ops, _ = bind_norm(registry_with(rms_norm))
    with pytest.raises(AssertionError, match="'attention' was called but never requested"):
        ops.attention(None, None, None, causal=True)


def requests_of_all_kinds():
    features = {
        "attention": [
            {"causal"},
            {"causal", "gqa", "window", "doc_ids"},
            {"causal", "cross_length"},
            {"causal", "doc_ids", "offset"},
            {"causal", "offset", "lse", "lse_backward"},  # some queries see nothing
            {"causal", "cross_length", "window", "offset", "doc_ids", "query_doc_ids", "lse"},
            {"doc_ids", "query_doc_ids", "lse", "lse_backward"},
            {"lse", "lse_backward"},
        ],
    }
    for op in CASES:
        for wanted in features.get(op, [set()]):
            yield Request(
                op=op,
                device=look("cpu"),
                dtype="float32",
                features=frozenset(wanted),
                sizes={"H": 4, "K": 2, "D": 16, "E": 32},
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bundled_backend_is_accused(dtype):
    """Every bundled kernel passes the trial of every request that it says it supports."""
    candidates = load_registry().candidates
    tried = 0
    for request in requests_of_all_kinds():
        if request.op == "optimizer" and dtype != "float32":
            continue  # the contract's optimizer works on float32 alone
        request = Request(
            op=request.op,
            device=request.device,
            dtype=dtype,
            features=request.features,
            sizes=request.sizes,
        )
        mine = [c for c in candidates if c.backend.op == request.op]
        reference = next(c for c in mine if c.backend.level is Level.REFERENCE)
        for candidate in mine:
            if not candidate.backend.supports(request):
                found = probe(candidate.backend.load(), reference.backend.load(), request)
                assert found is None, (candidate.qualified_name, request.features, str(found))
                tried += 1
    assert tried >= 14


def test_a_trial_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    bind_norm(registry_with(rms_norm))
    assert torch.equal(torch.rand(3), wanted)
