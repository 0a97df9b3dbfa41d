"""What reaches torch from the attention backends; their values are the conformance suite's work."""

import contextlib
from importlib import import_module

import pytest
import torch
from picotron_backends.mem_efficient import blockwise
from picotron_conformance import oracles

MODULES = {
    "naive-math": "picotron_backends.naive_math.attention",
    "sdpa": "picotron_backends.sdpa.attention",
    "mem_efficient": "picotron_backends.mem_efficient.attention",
}


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sdpa_refuses_to_return_an_lse():
    q, k, v = (normal(1, 1, 4, 8, seed=seed) for seed in range(3))
    with pytest.raises(ValueError, match="lse"):
        import_module(MODULES["sdpa"]).attention(q, k, v, causal=True, return_lse=True)


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
    q, k, v = (normal(1, heads, 9, 8, seed=heads) for heads in (6, 2, 2))
    found = sdpa.attention(q, k, v, causal=True)
    wanted, _ = oracles.attention(q, k, v, causal=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
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


CHUNK, CHUNKS = 12, 4
# (B, S). Documents end inside of a chunk and with one, and go on over several.
ENDS = torch.tensor([[5, 12, 13, 40], [3, 24, 30, 31]])
DOCUMENTS = (torch.arange(CHUNK * CHUNKS) >= ENDS[:, :, None]).sum(1)


def by_blocks(attention, q, k, v, *, window, doc_ids):
    """Each chunk of the queries over each chunk of the keys alone, merged by their lse."""
    queries, keys, values = (tensor.split(CHUNK, dim=2) for tensor in (q, k, v))
    ids = [None] * CHUNKS if doc_ids is None else doc_ids.split(CHUNK, dim=1)
    merged = []
    for i in range(CHUNKS):
        parts = [
            attention(
                queries[i],
                keys[j],
                values[j],
                causal=True,
                window=window,
                doc_ids=ids[j],
                offset=(i - j) * CHUNK,  # for j > i nothing is seen
                query_doc_ids=ids[i],
                return_lse=True,
            )
            for j in range(CHUNKS)
        ]
        outs, lses = map(torch.stack, zip(*parts, strict=True))
        lse = lses.logsumexp(0)
        merged.append((((lses - lse).exp()[..., None] * outs).sum(0), lse))
    outs, lses = zip(*merged, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


@pytest.mark.parametrize("name", ["naive-math", "mem_efficient"])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("doc_ids", [None, DOCUMENTS], ids=["", "documents"])
def test_blocks_that_are_merged_by_their_lse_are_the_whole(monkeypatch, name, window, doc_ids):
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 7)  # divides no chunk
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 5)
    attention = import_module(MODULES[name]).attention
    S = CHUNK * CHUNKS
    leaves = [
        normal(2, heads, S, 8, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2))
    ]
    upstream = normal(2, 4, S, 8, seed=7), normal(2, 4, S, seed=8)
    whole = attention(*leaves, causal=True, window=window, doc_ids=doc_ids, return_lse=True)
    blocks = by_blocks(attention, *leaves, window=window, doc_ids=doc_ids)
    found, wanted = (
        (*outputs, *torch.autograd.grad(outputs, leaves, upstream)) for outputs in (blocks, whole)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
