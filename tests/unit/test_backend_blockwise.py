"""The blockwise attention: its own backward, its blocks, and what it leaves out."""

import pytest
import torch
from picotron_backends.mem_efficient import blockwise as module
from picotron_backends.mem_efficient.attention import attention
from picotron_backends.mem_efficient.blockmask import BlockMask
from picotron_conformance import oracles
from torch.utils._python_dispatch import TorchDispatchMode

MASKS = {
    "causal": (7, 7, {"causal": True}),
    "full": (4, 7, {"causal": False}),
    "fewer-queries": (4, 9, {"causal": True}),
    "dead-rows": (7, 4, {"causal": True}),
    "window": (9, 9, {"causal": True, "window": 3}),
    "documents": (8, 8, {"causal": True, "doc_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]] * 2)}),
    "before": (7, 7, {"causal": True, "offset": -3}),
    "beyond": (7, 8, {"causal": True, "offset": 5, "window": 6}),
    "query-documents": (
        *(5, 8),
        {
            **{"causal": True, "offset": 6},
            "doc_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [3, 3, 3, 3, 4, 4, 4, 4]]),
            "query_doc_ids": torch.tensor([[1, 1, 2, 2, 2], [4, 4, 4, 5, 5]]),
        },
    ),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that divide nothing, so that a short sequence already takes several, ragged ones."""
    monkeypatch.setattr(module, "QUERY_BLOCK", 3)
    monkeypatch.setattr(module, "KEY_BLOCK", 2)


def leaves_of(T, S, *, D=3, H=2, K=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, H, T, D), (2, K, S, D), (2, K, S, D))
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", MASKS)
def test_backward_is_the_derivative_of_forward(case):
    T, S, arguments = MASKS[case]

    def out_and_lse(q, k, v):
        out, lse = attention(q, k, v, return_lse=True, **arguments)
        assert out.dtype == lse.dtype == torch.float64
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(out_and_lse, leaves_of(T, S), check_undefined_grad=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", MASKS)
def test_many_ragged_blocks_equal_the_oracle(case):
    T, S, arguments = MASKS[case]
    leaves = leaves_of(T, S)
    found = attention(*leaves, return_lse=True, **arguments)
    torch.testing.assert_close(found, oracles.attention(*leaves, **arguments))


def test_gradients_of_dead_rows_are_zero_through_the_lse_too():
    q, k, v = leaves_of(5, 2)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert lse[:, :, :3].eq(-torch.inf).all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][:, :, :3].eq(0).all()


class CountProducts(TorchDispatchMode):
    """Multiplications in matrix products."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
            self.total += result.numel() * args[-1].shape[-2]
        return result


def products(T, **arguments):
    q, k, v = (t.detach() for t in leaves_of(T, T, dtype=torch.float32))
    with CountProducts() as count:
        attention(q, k, v, **arguments)
    return count.total


def test_blocks_that_nobody_sees_are_not_computed():
    T = 6 * module.KEY_BLOCK
    everything = products(T, causal=False)
    assert products(T, causal=True) < 0.62 * everything
    assert products(T, causal=True, window=module.KEY_BLOCK) < 0.4 * everything
    assert products(T, causal=True, offset=-T // 2) < 0.2 * everything
    assert products(T, causal=True, offset=T, window=T // 2) < 0.2 * everything
    assert products(T, causal=True, offset=-T) == 0


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8), slice(8, 11)])
@pytest.mark.parametrize(
    ("first", "S", "window"),
    [
        *[(0, 11, None), (0, 11, 3), (9, 20, 5), (-5, 6, 2)],
        *[(3, 20, None), (-7, 11, None), (30, 11, None), (5, 11, 8), (-20, 11, 4), (30, 11, 4)],
    ],
)
def test_reach_is_exactly_the_keys_that_the_oracle_sees(rows, first, S, window):
    mask = BlockMask(S=S, first=first, causal=True, window=window, doc_ids=None)
    seen = {
        s
        for t in range(rows.start, rows.stop)
        for s in oracles.seen_keys(
            t, T=11, S=S, causal=True, window=window, documents=None, offset=first
        )
    }
    assert set(range(*mask.reach(rows))) == seen
