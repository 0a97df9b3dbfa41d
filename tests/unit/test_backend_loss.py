"""The loss backends in many small chunks, and what mem_efficient never allocates."""

from importlib import import_module

import pytest
import torch
from picotron_backends.mem_efficient import loss as chunked
from picotron_conformance import oracles
from torch.utils._python_dispatch import TorchDispatchMode

IGNORED = -100
BACKENDS = {
    name: import_module(f"picotron_backends.{module}.loss").loss
    for name, module in (("naive-math", "naive_math"), ("mem_efficient", "mem_efficient"))
}
ALL = pytest.mark.parametrize("loss", BACKENDS.values(), ids=BACKENDS)
# bfloat16: logits and their gradient are rounded to it before the matrix products (2^-9 each)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three tokens, which divide no N below."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda **_: 3)


def case_of(N, E, V, dtype=torch.float32, ignored=()):
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, E, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, E, generator=generator) / E**0.5 + 0.1).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[: min(N, 2)] = torch.tensor([0, V - 1])[: min(N, 2)]
    targets[list(ignored)] = IGNORED
    return hidden, weight, targets


def compare(loss, hidden, weight, targets, upstream=1.0, ignore_index=IGNORED):
    dtype = hidden.dtype
    before = [tensor.detach().clone() for tensor in (hidden, weight, targets)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    found = loss(hidden, weight, targets, ignore_index=ignore_index)
    grads = torch.autograd.grad(found * upstream, (hidden, weight))
    wanted = oracles.loss(*exact, targets, ignore_index=ignore_index)
    exact_grads = torch.autograd.grad(wanted * upstream, exact)
    assert all(map(torch.equal, (hidden, weight, targets), before))
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert abs(found.item() - wanted.item()) <= TOLERANCE[dtype] * wanted.abs().item()
    for got, want in zip(grads, exact_grads, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@ALL
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("N", "E", "V"), [(1, 4, 1), (2, 5, 7), (10, 8, 3), (11, 16, 129)])
@pytest.mark.usefixtures("small_chunks")
def test_equals_the_oracle(loss, N, E, V, dtype):
    compare(loss, *case_of(N, E, V, dtype), upstream=0.37)


@ALL
def test_a_target_outside_the_vocabulary_is_an_error(loss):
    hidden, weight, targets = case_of(4, 8, 5)
    targets[1] = 5
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss(hidden, weight, targets, ignore_index=IGNORED)


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Allocations(TorchDispatchMode):
    """The sizes of all that torch's ops return, and the matrix products, both ways."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else (result,)
        self.largest = max(
            self.largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor)), 0
        )
        self.products += func.overloadpacket in PRODUCTS
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mem_efficient_never_holds_all_logits(monkeypatch, dtype):
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 4096)
    N, E, V = 600, 16, 512
    watched = {}
    for name, loss in BACKENDS.items():
        hidden, weight, targets = case_of(N, E, V, dtype)
        with Allocations() as watched[name]:
            loss(hidden, weight, targets, ignore_index=IGNORED).backward()
    assert watched["naive-math"].largest == N * V  # so the watching works
    assert watched["mem_efficient"].largest <= max(4096, N * E, V * E)


def test_mem_efficient_computes_no_gradient_that_nobody_asks_for():
    products = {}
    for free in ("none", "hidden", "weight", "no_grad"):
        hidden, weight, targets = case_of(9, 8, 13)
        hidden.requires_grad_(free not in ("none", "weight"))
        weight.requires_grad_(free not in ("none", "hidden"))
        with Allocations() as watched, torch.set_grad_enabled(free != "no_grad"):
            chunked.loss(hidden, weight, targets, ignore_index=IGNORED)
        products[free] = watched.products
    # in two chunks
    assert products == {"none": 2, "hidden": 4, "weight": 4, "no_grad": 2}


def test_chunks_are_small_but_not_too_small():
    assert chunked.chunk_rows(N=4096, E=512, V=4096) == 1024  # the budget of logits
    assert chunked.chunk_rows(N=8192, E=2048, V=2**17) == 1024  # half of the weight's gradient
    assert chunked.chunk_rows(N=512, E=2048, V=2**17) == 256  # but not all tokens
    assert chunked.chunk_rows(N=1, E=1, V=2**23) == 1
