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
    [without_eps_and_order, without_weight_gradient, with_nan, raising, only_forward],
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
