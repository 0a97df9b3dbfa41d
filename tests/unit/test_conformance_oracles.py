"""The judges are judged: oracles against finite differences, torch and transformers, and the golden
computations against the oracles.
"""

import math

import pytest
import torch
from picotron_conformance import oracles
from picotron_conformance.cases import cases_of
from picotron_conformance.cases.optimizer import PLAIN, Updates, hyper
from picotron_conformance.forms import FORMS
from picotron_conformance.golden.optimizer import adamw
from picotron_conformance.problem import problem_of
from picotron_conformance.updates import numbers_of
from torch.nn import functional as F

SEED = 5


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(found, wanted, **tolerance):
    torch.testing.assert_close(found, wanted, **({"rtol": 1e-11, "atol": 1e-12} | tolerance))


MASKS = {
    "causal": (6, 6, {"causal": True}),
    "full": (4, 7, {"causal": False}),
    "chunk": (3, 8, {"causal": True}),
    "window": (7, 7, {"causal": True, "window": 3}),
    "documents": (6, 6, {"causal": True, "doc_ids": torch.tensor([[0, 0, 1, 1, 1, 2]] * 2)}),
    "scale": (5, 5, {"causal": True, "scale": -0.3}),
    "offset": (3, 8, {"causal": True, "offset": 2}),
    "beyond": (5, 6, {"causal": True, "offset": 4, "window": 5}),
    "query-documents": (
        *(4, 6),
        {
            **{"causal": False, "doc_ids": torch.tensor([[0, 0, 1, 1, 1, 2]] * 2)},
            "query_doc_ids": torch.tensor([[1, 1, 0, 2], [2, 0, 0, 1]]),
        },
    ),
    "all": (
        *(5, 6),
        {
            **{"causal": True, "offset": 4, "window": 5},
            "doc_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]),
            "query_doc_ids": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 2, 2, 2]]),
        },
    ),
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_torch(mask):
    T, S, arguments = MASKS[mask]
    q, k, v = normal(2, 4, T, 8, seed=1), normal(2, 2, S, 8, seed=2), normal(2, 2, S, 8, seed=3)
    # The mask by other means than the oracle's: ages, counted back from the last key.
    query = (S - 1 - arguments.get("offset", S - T) - torch.arange(T))[:, None]
    key = torch.arange(S).flip(0)[None, :]
    sees = torch.ones(2, 1, T, S, dtype=torch.bool)
    if arguments["causal"]:
        sees &= key >= query
    if "window" in arguments:
        sees &= key - query < arguments["window"]
    if "doc_ids" in arguments:
        one_hot = F.one_hot(arguments["doc_ids"], 3).double()
        own = one_hot[:, S - T :]
        if "query_doc_ids" in arguments:
            own = F.one_hot(arguments["query_doc_ids"], 3).double()
        sees &= (own @ one_hot.mT)[:, None] > 0
    expanded = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scale = arguments.get("scale")
    wanted = F.scaled_dot_product_attention(q, *expanded, attn_mask=sees, scale=scale)
    out, lse = oracles.attention(q, k, v, **arguments)
    close(out, wanted)
    logits = (q @ expanded[0].mT) * (scale or 8**-0.5)
    close(lse, logits.masked_fill(~sees, -math.inf).logsumexp(-1))


def test_where_queries_stand_tells_the_documents_of_those_that_bring_none():
    """A query among the keys has the document of the key at its position."""
    ids = torch.tensor([[0, 0, 1, 1, 2, 2], [3, 1, 1, 1, 1, 0]])
    q, k = normal(2, 2, 3, 4), normal(2, 2, 6, 4)
    found = oracles.attention(q, k, k, causal=False, doc_ids=ids, offset=2)
    own = ids[:, 2:5]
    close(found, oracles.attention(q, k, k, causal=False, doc_ids=ids, query_doc_ids=own))


def test_attention_of_a_query_that_sees_nothing():
    q, k = normal(1, 2, 5, 4), normal(1, 2, 3, 4)
    out, lse = oracles.attention(q, k, k, causal=True)
    assert out[:, :, :2].eq(0).all()
    assert lse[:, :, :2].eq(-math.inf).all()
    assert lse[:, :, 2:].isfinite().all()


def test_norm_equals_torch_and_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = normal(3, 5, 16), normal(16, seed=1)
    found = oracles.rms_norm(x, weight, eps=1e-3)
    close(found, F.rms_norm(x, (16,), weight, 1e-3))
    theirs = LlamaRMSNorm(16, eps=1e-3).double()
    theirs.weight.data.copy_(weight)
    close(found, theirs(x), rtol=1e-5, atol=1e-6)  # it computes in float32


def test_rope_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, angle = normal(2, 4, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2), normal(2, 5, 4, seed=3)
    cos, sin = (torch.cat((table, table), -1) for table in (angle.cos(), angle.sin()))
    close(oracles.rope(q, k, angle.cos(), angle.sin()), apply_rotary_pos_emb(q, k, cos, sin))


def test_swiglu_and_loss_equal_torch():
    gate, up = normal(4, 7) * 3, normal(4, 7, seed=1)
    close(oracles.swiglu(gate, up), F.silu(gate) * up)
    hidden, weight = normal(6, 5), normal(9, 5, seed=1)
    targets = torch.tensor([0, 8, -100, 3, 3, -100])
    wanted = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    close(oracles.loss(hidden, weight, targets, ignore_index=-100), wanted)


@pytest.mark.parametrize("step", [1, 2, 40])
def test_adamw_equals_torch(step):
    p, g, m, v = (normal(5, seed=seed) for seed in range(4))
    leaf = p.clone().requires_grad_()
    theirs = torch.optim.AdamW(
        [leaf], lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.5, foreach=False
    )
    theirs.state[leaf] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.square(),
    }
    leaf.grad = g
    theirs.step()
    found = oracles.adamw(
        p, g, m, v.square(), step=step, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.5
    )
    state = theirs.state[leaf]
    close(found, (leaf.detach(), state["exp_avg"], state["exp_avg_sq"]))


@pytest.mark.parametrize("mask", MASKS)
def test_attention_by_finite_differences(mask):
    T, S, arguments = MASKS[mask]
    leaves = [normal(2, 2, T, 3), normal(2, 1, S, 3, seed=1), normal(2, 1, S, 3, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *qkv: oracles.attention(*qkv, **arguments), leaves)


def test_the_others_by_finite_differences():
    targets = torch.tensor([1, -100, 4])
    functions = {
        "norm": (lambda x, w: oracles.rms_norm(x, w, eps=1e-2), (3, 4), (4,)),
        "rope": (lambda q, k: oracles.rope(q, k, normal(3, 2), normal(3, 2)), *[(1, 2, 3, 4)] * 2),
        "swiglu": (oracles.swiglu, (3, 4), (3, 4)),
        "loss": (lambda h, w: oracles.loss(h, w, targets, ignore_index=-100), (3, 4), (5, 4)),
    }
    for function, *shapes in functions.values():
        leaves = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        assert torch.autograd.gradcheck(function, leaves)


def cases_to_compare():
    for op in FORMS:
        for case in cases_of(op, "float32", "quick", SEED):
            if case.elements <= 5000 and 0 not in case.sizes.values():
                yield pytest.param(case, id=f"{op}-{case.name}")


@pytest.mark.parametrize("case", list(cases_to_compare()))
def test_golden_results_equal_the_oracle(case):
    """Outputs, and the gradients that are written out there and come of autograd here."""
    form, problem = FORMS[case.op], problem_of(case, SEED)
    found = form.golden(problem.tensors, problem.upstream, **case.options)
    leaves = {n: problem.tensors[n].clone().requires_grad_() for n in form.gradients}
    outputs = form.oracle({**problem.tensors, **leaves}, case.options)
    for name in case.outputs:
        close(found[name], outputs[name].detach())
    # Rows that see nothing have an lse of -inf, which no gradient goes through; if all see nothing,
    # there is no graph either.
    total = sum(leaf.sum() * 0 for leaf in leaves.values()) + sum(
        torch.where(outputs[name].isfinite(), outputs[name] * given, 0).sum()
        for name, given in problem.upstream.items()
    )
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        wanted = torch.zeros_like(leaf) if gradient is None else gradient
        # Absolute too: where a gradient cancels to nothing, either is left with its own roundings.
        close(
            found[form.gradients[name]],
            wanted,
            rtol=1e-9,
            atol=1e-9 * float(wanted.abs().max()) + 1e-11,
        )


@pytest.mark.parametrize(
    "changed", [{}, {"lr": 0.0}, {"weight_decay": 0.0}, {"beta1": 0.0}, {"eps": 1e-8}], ids=str
)
def test_golden_updates_equal_the_oracle(changed):
    settings = hyper(**changed)
    case = Updates(name="", shapes=((7,),), steps=5, first_step=3, state=True, hyper=settings)
    numbers = numbers_of(case, SEED)
    p, m, v = numbers.params[0], *(numbers.states[n][0] for n in ("exp_avg", "exp_avg_sq"))
    grads = [given[0] for given in numbers.grads]
    found = adamw(p, m, v, grads, case.schedule)
    start = p
    given = {name: getattr(settings, name) for name in PLAIN.__dataclass_fields__}
    for step, grad in enumerate(grads, start=3):
        p, m, v = oracles.adamw(p, grad, m, v, step=step, **given)
    close(found, {"update": p - start, "exp_avg": m, "exp_avg_sq": v})
