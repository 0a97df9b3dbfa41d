"""norm, rope and swiglu: every backend against the float64 oracle, forward and all gradients."""

from importlib import import_module

import pytest
import torch
from picotron_conformance import oracles

NORMS = {
    "naive-math": "picotron_backends.naive_math.norm:rms_norm",
    "torch-fused": "picotron_backends.torch_fused.norm:rms_norm",
}
SWIGLUS = {
    "naive-math": "picotron_backends.naive_math.swiglu:swiglu",
    "mem_efficient": "picotron_backends.mem_efficient.swiglu:swiglu",
}
ROPES = {"naive-math": "picotron_backends.naive_math.rope:rope"}

# Relative to the largest value of the row (of the tensor where it has no rows), or to one: a norm's
# gradient is a difference of terms of that size. bfloat16: 2^-9 a rounding, a handful in a chain.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=[str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
)


def load(path):
    module, name = path.split(":")
    return getattr(import_module(module), name)


def normal(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_near(found, wanted, dtype, what):
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    size = wanted.abs().amax(-1, keepdim=True) if wanted.dim() > 1 else wanted.abs().max()
    size = size.clamp(min=1)
    excess = (found.double() - wanted).abs() - TOLERANCE[dtype] * size
    assert excess.max() <= 0, f"{what}: {excess.max():.2e} beyond the tolerance"


def compare(kernel, oracle, inputs, upstream=None):
    """`inputs` are leaves of any strides; `kernel` and `oracle` return a tensor or a tuple."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    before = [tensor.detach().clone() for tensor in inputs]
    found, wanted = kernel(*leaves), oracle(*exact)
    found = found if isinstance(found, tuple) else (found,)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    dtype = leaves[0].dtype
    ups = [upstream] if upstream is not None else [normal(*w.shape, seed=9) for w in wanted]
    ups = [up.to(dtype) for up in ups]
    grads = torch.autograd.grad(found, leaves, ups)
    exact_grads = torch.autograd.grad(wanted, exact, [up.double() for up in ups])
    assert all(map(torch.equal, leaves, before))
    for number, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert_near(got.detach(), want.detach(), dtype, f"output {number}")
    for number, (got, want) in enumerate(zip(grads, exact_grads, strict=True)):
        assert_near(got, want, dtype, f"gradient {number}")


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 64), (33, 129)])
@pytest.mark.parametrize("name", NORMS)
def test_norm_equals_the_oracle(name, shape, dtype):
    kernel = load(NORMS[name])
    x, weight = normal(*shape, seed=1, dtype=dtype), normal(shape[-1], seed=2, dtype=dtype)
    compare(
        lambda x, w: kernel(x, w, eps=1e-5),
        lambda x, w: oracles.rms_norm(x, w, eps=1e-5),
        (x + 0.5, weight),
    )


@pytest.mark.parametrize("name", NORMS)
def test_norm_rounds_before_it_multiplies(name):
    """Llama's order, bit for bit: with the weight first, one value in three comes out otherwise."""
    x, weight = (normal(*shape, seed=3, dtype=torch.bfloat16) for shape in ((64, 128), (128,)))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(load(NORMS[name])(x, weight, eps=1e-5), exact.bfloat16() * weight)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 2, 33)])
@pytest.mark.parametrize("name", SWIGLUS)
def test_swiglu_equals_the_oracle(name, shape, dtype):
    gate, up = normal(*shape, seed=1, dtype=dtype) * 4, normal(*shape, seed=2, dtype=dtype)
    compare(load(SWIGLUS[name]), oracles.swiglu, (gate, up))


def test_swiglu_mem_efficient_keeps_only_its_inputs_for_the_backward():
    def kept(name):
        sizes = []
        gate, up = (normal(8, 9, seed=seed).requires_grad_() for seed in (1, 2))

        def pack(tensor):
            sizes.append(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            load(SWIGLUS[name])(gate, up)
        return set(sizes) - {tensor.untyped_storage().data_ptr() for tensor in (gate, up)}

    assert len(kept("naive-math")) == 1
    assert kept("mem_efficient") == set()


@DTYPES
@pytest.mark.parametrize("tables", ["shared", "per-sequence"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 2), (2, 4, 2, 7, 6), (3, 3, 1, 5, 64)])
@pytest.mark.parametrize("name", ROPES)
def test_rope_equals_the_oracle(name, shape, tables, dtype):
    B, H, K, T, D = shape
    angle = normal(*((B,) if tables == "per-sequence" else ()), T, D // 2, seed=3) * 3
    cos, sin = angle.cos(), angle.sin()
    kernel = load(ROPES[name])
    compare(
        lambda q, k: kernel(q, k, cos, sin),
        lambda q, k: oracles.rope(q, k, cos, sin),
        (normal(B, H, T, D, seed=1, dtype=dtype), normal(B, K, T, D, seed=2, dtype=dtype)),
    )
