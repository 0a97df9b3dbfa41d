"""Every attention backend against the float64 oracle: outputs, lse and all gradients."""

import contextlib
from importlib import import_module

import pytest
import torch
from picotron_conformance import oracles

MODULES = {
    "naive-math": "picotron_backends.naive_math.attention",
    "sdpa": "picotron_backends.sdpa.attention",
    "mem_efficient": "picotron_backends.mem_efficient.attention",
}
WITH_LSE = ("naive-math", "mem_efficient")

# B, H, K, T, S, D and the arguments of the call
CASES = {
    "causal": ((2, 4, 4, 16, 16, 8), {"causal": True}),
    "full": ((2, 4, 4, 16, 16, 8), {"causal": False}),
    "gqa-2": ((1, 6, 3, 17, 17, 8), {"causal": True}),
    "gqa-4": ((2, 4, 1, 15, 15, 16), {"causal": True}),
    "odd-head": ((1, 2, 1, 13, 13, 13), {"causal": True}),
    "odd-head-full": ((1, 2, 2, 13, 13, 3), {"causal": False}),
    "scale": ((1, 2, 2, 12, 12, 8), {"causal": True, "scale": 0.83}),
    "one-token": ((2, 2, 1, 1, 1, 8), {"causal": True}),
    "one-query": ((2, 4, 2, 1, 21, 8), {"causal": True}),
    "one-query-full": ((1, 2, 2, 1, 21, 8), {"causal": False}),
    "fewer-queries": ((2, 4, 2, 5, 18, 8), {"causal": True}),
    "cross-full": ((1, 2, 1, 9, 4, 8), {"causal": False}),
    "dead-rows": ((2, 4, 2, 11, 6, 8), {"causal": True}),  # the first 5 queries see no key
    "one-key": ((1, 2, 2, 4, 1, 8), {"causal": True}),
    "window-1": ((1, 2, 1, 9, 9, 8), {"causal": True, "window": 1}),
    "window-5": ((2, 4, 2, 23, 23, 8), {"causal": True, "window": 5}),
    "window-wider": ((1, 2, 2, 9, 9, 8), {"causal": True, "window": 40}),
    "window-cross": ((1, 2, 1, 4, 19, 8), {"causal": True, "window": 3}),
    "window-dead": ((1, 2, 1, 9, 4, 8), {"causal": True, "window": 2}),
    "documents": ((2, 4, 2, 20, 20, 8), {"causal": True, "doc_ids": True}),
    "documents-full": ((2, 2, 2, 14, 14, 8), {"causal": False, "doc_ids": True}),
    "documents-cross": ((2, 2, 1, 6, 20, 8), {"causal": True, "doc_ids": True}),
    "documents-window": ((2, 4, 2, 20, 20, 8), {"causal": True, "doc_ids": True, "window": 4}),
    "several-blocks": ((1, 2, 1, 300, 300, 4), {"causal": True}),
    "several-blocks-window": ((1, 2, 1, 140, 310, 4), {"causal": True, "window": 70}),
}

# Largest error over the largest value. A rounding to bfloat16 is 2^-9 = 0.2%; the gradient of the
# logits is a difference, dP - rowsum(dout out), of terms several times its size, of which `out` was
# rounded already (and in torch's own kernel P too). What float32 catches need not be caught again.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2}


def kernel_of(name):
    return import_module(MODULES[name]).attention


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def documents(B, S):
    """Rows whose documents begin at different places; the second has ids that go down."""
    position = torch.arange(S)
    return torch.stack([(position + b) // 6 * (1 - 2 * b) for b in range(B)])


def inputs_of(shape, dtype):
    B, H, K, T, S, D = shape
    q, k, v = normal(B, H, T, D, seed=1), normal(B, K, S, D, seed=2), normal(B, K, S, D, seed=3)
    # A v far from zero mean makes the softmax's gradient a difference of large numbers.
    return [tensor.to(dtype) for tensor in (q * 1.5, k, v + 1)]


def arguments_of(shape, arguments):
    if "doc_ids" in arguments:
        return arguments | {"doc_ids": documents(shape[0], shape[4])}
    return arguments


def assert_near(found, wanted, dtype, what):
    assert found.shape == wanted.shape, what
    assert torch.equal(found.isfinite(), wanted.isfinite()), what
    finite = wanted.isfinite()
    error = (found.double() - wanted)[finite].abs().max()
    # at least one: a gradient that is exactly zero is the difference of terms of that size
    limit = TOLERANCE[dtype] * wanted[finite].abs().max().clamp(min=1)
    assert error <= limit, f"{what}: error {error:.2e}, limit {limit:.2e}"


def compare(kernel, leaves, arguments, upstream, upstream_lse=None):
    """Kernel and oracle on the same values: results, then the gradients of q, k and v."""
    with_lse = upstream_lse is not None
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    before = [leaf.detach().clone() for leaf in leaves]
    versions = [leaf._version for leaf in leaves]

    found = kernel(*leaves, **arguments, **({"return_lse": True} if with_lse else {}))
    found = found if with_lse else (found,)
    dtype = leaves[0].dtype
    gradients = [upstream, upstream_lse] if with_lse else [upstream]
    found_grads = torch.autograd.grad(found, leaves, gradients)

    assert [leaf._version for leaf in leaves] == versions
    assert all(map(torch.equal, leaves, before))
    wanted = oracles.attention(*exact, **arguments)[: 1 + with_lse]
    # A sum and not a list: where no query sees a key the oracle's output depends on nothing.
    total = sum(
        (w * g.double())[w.isfinite()].sum() for w, g in zip(wanted, gradients, strict=True)
    )
    total = total + sum(leaf.sum() * 0 for leaf in exact)
    wanted_grads = torch.autograd.grad(total, exact)

    assert found[0].dtype == dtype
    for name, got, want in zip(("out", "lse")[: len(found)], found, wanted, strict=True):
        assert_near(got.detach(), want.detach(), torch.float32 if name == "lse" else dtype, name)
    if with_lse:
        assert found[1].dtype == torch.float32
    for name, got, want in zip("qkv", found_grads, wanted_grads, strict=True):
        assert got.dtype == dtype
        assert_near(got, want, dtype, f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODULES)
def test_equals_the_oracle(name, case, dtype):
    shape, arguments = CASES[case]
    leaves = [tensor.requires_grad_() for tensor in inputs_of(shape, dtype)]
    upstream = normal(*leaves[0].shape, seed=4, dtype=dtype) + 0.5
    compare(kernel_of(name), leaves, arguments_of(shape, arguments), upstream)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", WITH_LSE)
def test_lse_and_its_gradient_equal_the_oracle(name, case):
    shape, arguments = CASES[case]
    leaves = [tensor.requires_grad_() for tensor in inputs_of(shape, torch.float32)]
    upstream, upstream_lse = normal(*leaves[0].shape, seed=4), normal(*leaves[0].shape[:3], seed=5)
    compare(kernel_of(name), leaves, arguments_of(shape, arguments), upstream, upstream_lse)


@pytest.mark.parametrize("name", WITH_LSE)
def test_lse_is_float32_in_bfloat16(name):
    shape = (2, 4, 2, 12, 12, 8)
    leaves = [tensor.requires_grad_() for tensor in inputs_of(shape, torch.bfloat16)]
    upstream = normal(*leaves[0].shape, seed=4, dtype=torch.bfloat16)
    compare(kernel_of(name), leaves, {"causal": True}, upstream, normal(2, 4, 12, seed=5))


@pytest.mark.parametrize("case", ["gqa-2", "documents-window", "fewer-queries"])
@pytest.mark.parametrize("name", MODULES)
def test_any_strides_and_an_expanded_upstream_gradient(name, case):
    shape, arguments = CASES[case]
    q, k, v = inputs_of(shape, torch.float32)
    # as the model hands them over: heads next to the head dim; every other value of a wider buffer
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.stack((k, k + 7), dim=-1).flatten(-2)[..., ::2]
    v = torch.cat((v + 7, v), dim=2)[:, :, v.shape[2] :]
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    assert not any(leaf.is_contiguous() for leaf in leaves[:2])
    upstream = torch.tensor(0.7).expand(q.shape)
    compare(kernel_of(name), leaves, arguments_of(shape, arguments), upstream)


@pytest.mark.parametrize("name", MODULES)
def test_a_query_that_sees_nothing_is_zero_and_sends_no_gradient(name):
    T, S = 7, 3
    q, k, v = (tensor.requires_grad_() for tensor in inputs_of((1, 2, 1, T, S, 4), torch.float32))
    out = kernel_of(name)(q, k, v, causal=True)
    dq, dk, dv = torch.autograd.grad(out[:, :, : T - S].sum(), (q, k, v), retain_graph=True)
    assert out[:, :, : T - S].eq(0).all()
    assert all(grad.eq(0).all() for grad in (dq, dk, dv))
    dq, _, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq[:, :, : T - S].eq(0).all()
    assert dv.ne(0).any()


@pytest.mark.parametrize("name", MODULES)
def test_large_logits_do_not_overflow(name):
    q, k, v = inputs_of((1, 1, 1, 40, 40, 8), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (q * 60, k * 60, v)]
    out = kernel_of(name)(*leaves, causal=True)
    wanted, _ = oracles.attention(*leaves, causal=True)
    # logits of thousands in float32 are known to 1e-3, and so are their exponentials
    torch.testing.assert_close(out.double(), wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", MODULES)
def test_only_what_wants_a_gradient_gets_one(name):
    q, k, v = inputs_of((1, 2, 1, 9, 9, 8), torch.float32)
    v.requires_grad_()
    out = kernel_of(name)(q, k, v, causal=True)
    out.sum().backward()
    assert q.grad is None
    assert v.grad.shape == v.shape
    with torch.no_grad():
        assert not kernel_of(name)(q, k, v, causal=True).requires_grad


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("T", "arguments"),
    [
        (4, {"causal": True, "window": 0}),
        (4, {"causal": False, "window": 2}),
        (5, {"causal": True, "doc_ids": torch.zeros(1, 4, dtype=torch.long)}),
    ],
)
def test_what_the_contract_forbids_is_refused(name, T, arguments):
    q, k, v = inputs_of((1, 1, 1, T, 4, 8), torch.float32)
    with pytest.raises(ValueError, match=r"window|doc_ids"):
        kernel_of(name)(q, k, v, **arguments)


def test_sdpa_refuses_to_return_an_lse():
    q, k, v = inputs_of((1, 1, 1, 4, 4, 8), torch.float32)
    with pytest.raises(ValueError, match="lse"):
        kernel_of("sdpa")(q, k, v, causal=True, return_lse=True)


@pytest.mark.parametrize(
    ("device_type", "capability", "dtype", "D", "masked", "expands"),
    [
        ("cpu", None, "float32", 64, False, False),
        ("cpu", None, "float32", 64, True, False),
        ("cuda", (6, 1), "float16", 64, False, True),
        ("cuda", (7, 5), "float16", 64, False, True),
        ("cuda", (8, 0), "bfloat16", 64, False, False),
        ("cuda", (9, 0), "float16", 256, False, False),
        ("cuda", (9, 0), "float16", 264, False, True),
        ("cuda", (8, 0), "float16", 200, False, False),
        ("cuda", (8, 6), "float16", 200, False, True),
        ("cuda", (8, 9), "float16", 256, False, False),
        ("cuda", (12, 0), "bfloat16", 224, False, True),
        ("cuda", (9, 0), "bfloat16", 64, True, True),
        ("cuda", (9, 0), "float32", 64, False, True),
    ],
)
def test_groups_reach_torch_only_where_flash_takes_them(
    device_type, capability, dtype, D, masked, expands
):
    sdpa = import_module(MODULES["sdpa"])
    found = sdpa.expands_kv(
        device_type=device_type, capability=capability, dtype=dtype, D=D, masked=masked
    )
    assert found is expands


@pytest.mark.parametrize("expands", [True, False])
def test_sdpa_expands_keys_when_it_must(monkeypatch, expands):
    """The values are the same either way; what torch is handed is not."""
    sdpa, handed = import_module(MODULES["sdpa"]), []
    torchs_own = sdpa.scaled_dot_product_attention

    def watched(q, k, v, **arguments):
        handed.append((k.shape[1], arguments["enable_gqa"]))
        return torchs_own(q, k, v, **arguments)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(sdpa, "expands_kv", lambda **_: expands)
    leaves = [tensor.requires_grad_() for tensor in inputs_of((1, 6, 2, 9, 9, 8), torch.float32)]
    compare(sdpa.attention, leaves, {"causal": True}, normal(1, 6, 9, 8, seed=4))
    assert handed == [(6, False) if expands else (2, True)]


@pytest.mark.parametrize("groups", [1, 3])
def test_the_pinned_call_allows_one_kernel_and_gets_whole_heads(monkeypatch, groups):
    """What reaches torch, where no CUDA device is there to run it: the values by its CPU kernel."""
    module, handed = import_module(MODULES["mem_efficient"]), []

    @contextlib.contextmanager
    def pinned(backend):
        handed.append(backend)
        yield

    def watched(q, k, v, **arguments):
        handed.append((k.shape[1], v.shape[1], arguments))
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **arguments)

    monkeypatch.setattr(module, "sdpa_kernel", pinned)
    monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    q, k, v = (normal(1, heads, 8, 9, seed=heads).mT for heads in (2 * groups, 2, 2))
    found = module._pinned(q, k, v, causal=True, scale=0.3)
    assert handed == [
        module.SDPBackend.EFFICIENT_ATTENTION,
        (2 * groups, 2 * groups, {"is_causal": True, "scale": 0.3}),
    ]
    wanted, _ = oracles.attention(q.double(), k.double(), v.double(), causal=True, scale=0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
