"""Right kernels that compute in other ways: a plugin, declared without torch.

The suite must not accuse any of them, whatever the seed. Each is written as real kernels are:
16-bit products are summed in float32, and 16-bit values are stored where a kernel must store them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from picotron_core.registry import (
    Backend,
    Code,
    Level,
    Reason,
    Request,
    hookimpl,
    kernel_from,
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A right kernel at `picotron_zoo.<op>:<name>`; how it differs, and what it claims."""

    op: str
    name: str
    what: str
    claims: Mapping[str, Any] = field(default_factory=dict)


def _table(op: str, rows: Mapping[str, str], **claims: Any) -> Iterator[Kept]:
    return (Kept(op, name, what, claims) for name, what in rows.items())


def square_heads_alone(request: Request) -> Sequence[Reason]:
    """What a first version of a kernel often serves: T = S, D up to 128, no extras, 16 bits."""
    extras = sorted(request.features - {"causal", "gqa"})
    reasons = [
        Reason(code=Code.FEATURE, detail=f"this kernel does not know {feature}")
        for feature in extras
    ]
    if request.dtype not in ("float16", "bfloat16"):
        reasons.append(Reason(code=Code.DTYPE, detail=f"{request.dtype} is not served"))
    if request.sizes.get("D", 1) > 128:
        reasons.append(Reason(code=Code.SHAPE, detail="D must be at most 128"))
    return reasons


ZOO: tuple[Kept, ...] = (
    *_table(
        "attention",
        {
            "tiles_32_64": "online softmax, tiles of 32 queries and 64 keys, hidden tiles skipped",
            "tiles_64_16": "the same with tiles of 64 queries and 16 keys",
            "base_2": "exp2 of logits scaled by log2(e)",
            "keys_in_reverse": "tiles of keys from the last to the first",
            "query_scaled_first": "the query is scaled in float32 before the product",
            "split_keys": "keys in three parts, merged by their lse",
            "keys_outside": "the backward walks keys outside and queries inside",
            "delta_of_weights": "delta as the sum of P dP, not of dout out",
            "heads_rounded_then_added": "dk and dv rounded per query head, then added up",
            "groups_as_rows": "the query heads of a group are rows of one matrix",
            "rows_of_transposed_memory": "out lies in memory as (B, T, H, D)",
            "tiles_padded": "T and S padded to whole tiles, the padding masked",
            "whole_matrix": "the whole matrix of weights, normalised before it meets v",
            "double_precision": "all in float64, rounded once",
        },
    ),
    *_table(
        "attention",
        {
            "eager_16_bits": "logits and dP in the inputs' dtype, as in eager models",
            "tensor_float_32": "float32 operands of products rounded to TF32",
        },
        tier="B",
    ),
    *_table(
        "attention",
        {"partial": "T = S, D up to 128, 16 bits, nothing but causal and groups"},
        supports=square_heads_alone,
    ),
    *_table("attention", {"traceable": "plain torch that compiles"}, compiles=True),
    *_table(
        "norm",
        {
            "two_sums": "squares summed in blocks of 32, then the blocks",
            "rounded_once": "the weight is applied in float32, rounded once",
            "closed_form": "dx of the normed x that was kept",
            "rows_in_blocks": "dweight summed in blocks of 32 rows, then the blocks",
            "root_and_division": "x / sqrt, not x times rsqrt",
            "double_precision": "statistics and sums in float64",
        },
    ),
    *_table("norm", {"root_in_16_bits": "statistics rounded to the inputs' dtype"}, tier="B"),
    *_table(
        "rope",
        {
            "complex_numbers": "one complex multiplication in float32",
            "products_rounded": "each product rounded to the inputs' dtype",
            "tables_rounded": "tables in the inputs' dtype, as in Llama's own code",
            "rotate_half": "x cos + rotate_half(x) sin over the full width",
            "double_precision": "all in float64, rounded once",
        },
    ),
    *_table(
        "swiglu",
        {
            "division": "gate / (1 + exp(-gate))",
            "silu_rounded": "silu rounded to the inputs' dtype before it meets up",
            "sigmoid_kept": "sigmoid kept in float32 for the backward",
            "slope_in_two_terms": "silu' as sigmoid + silu (1 - sigmoid)",
            "double_precision": "all in float64, rounded once",
        },
    ),
    *_table(
        "loss",
        {
            "vocabulary_tiles": "online logsumexp over tiles of 16 tokens of the vocabulary",
            "gradient_in_forward": "chunks of eight tokens, gradients made in the forward",
            "logits_in_float32": "logits are never rounded",
            "target_apart": "the target's logit by a product of its own",
            "upstream_first": "dlogits times upstream, then rounded, then multiplied",
            "valid_tokens_alone": "ignored tokens are dropped before the product",
            "double_precision": "all in float64, rounded once",
        },
    ),
    *_table(
        "optimizer",
        {
            "lists_at_once": "torch's functions over lists of tensors",
            "corrections_in_rate": "bias corrections folded into lr and eps",
            "division_into_sum": "addcdiv with sqrt(v) over the root of the correction",
            "interpolated": "moments by lerp",
            "one_flat_buffer": "all parameters copied into one, updated, copied back",
            "double_precision": "all in float64, rounded once",
        },
    ),
)


def anything(request: Request) -> Sequence[Reason]:
    return ()


def backend_of(kept: Kept) -> Backend:
    return Backend(
        **{
            "op": kept.op,
            "name": kept.name,
            "level": Level.PORTABLE,
            "load": kernel_from(f"picotron_zoo.{kept.op}:{kept.name}"),
            "supports": anything,
            "summary": kept.what,
            **kept.claims,
        }
    )


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    return map(backend_of, ZOO)
