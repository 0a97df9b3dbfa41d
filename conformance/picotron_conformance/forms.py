"""The ops that are functions of tensors: how each kernel is called, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from picotron_conformance import oracles
from picotron_conformance.check import WrongKernelError
from picotron_conformance.golden.attention import attention
from picotron_conformance.golden.loss import loss
from picotron_conformance.golden.norm import rms_norm
from picotron_conformance.golden.rope import rope
from picotron_conformance.golden.swiglu import swiglu
from picotron_core.registry.types import Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How an op's kernel is called with named tensors, and what it answers.

    gradients: by the name of the input, the name of its gradient.
    reaches: by the name of the input, the outputs that depend on it, where that is not all.
    oracle: the outputs in float64, to be differentiated by autograd.
    always_float32: inputs and outputs that do not take the compute dtype.
    alike: two inputs that may be one tensor, where they are of one shape.
    """

    op: str
    call: Callable[[Kernel, Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
    golden: Callable[..., dict[str, Tensor]]
    oracle: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
    gradients: Mapping[str, str]
    reaches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    always_float32: frozenset[str] = frozenset()
    alike: tuple[str, ...] = ()


def _attention(
    kernel: Kernel, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    answer = kernel(tensors["q"], tensors["k"], tensors["v"], **options, **_documents(tensors))
    if options.get("return_lse"):
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise WrongKernelError("return_lse=True must return (out, lse)")
        return {"out": answer[0], "lse": answer[1]}
    return {"out": answer}


def _documents(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensors[name] for name in ("doc_ids", "query_doc_ids") if name in tensors}


def _golden_attention(
    tensors: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    *,
    return_lse: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    return attention(tensors, upstream, **options)


def _oracle_attention(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    given: dict[str, Any] = {n: value for n, value in options.items() if n != "return_lse"}
    q, k, v = (tensors[name] for name in "qkv")
    out, lse = oracles.attention(q, k, v, **_documents(tensors), **given)
    return {"out": out, "lse": lse}


def _norm(
    kernel: Kernel, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    return {"y": kernel(tensors["x"], tensors["weight"], **options)}


def _rope(
    kernel: Kernel, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    answer = kernel(tensors["q"], tensors["k"], tensors["cos"], tensors["sin"])
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise WrongKernelError("rope must return (q, k)")
    return {"q_out": answer[0], "k_out": answer[1]}


def _oracle_rope(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    q, k = oracles.rope(**tensors)
    return {"q_out": q, "k_out": k}


def _swiglu(
    kernel: Kernel, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    return {"y": kernel(tensors["gate"], tensors["up"])}


def _loss(
    kernel: Kernel, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    return {"loss": kernel(tensors["hidden"], tensors["weight"], tensors["targets"], **options)}


def _oracle_loss(t: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"loss": oracles.loss(t["hidden"], t["weight"], t["targets"], **options)}


FORMS = {
    "attention": Form(
        op="attention",
        call=_attention,
        golden=_golden_attention,
        oracle=_oracle_attention,
        gradients={"q": "dq", "k": "dk", "v": "dv"},
        reaches={"v": ("out",)},
        always_float32=frozenset({"lse"}),
        alike=("k", "v"),
    ),
    "norm": Form(
        op="norm",
        call=_norm,
        golden=rms_norm,
        oracle=lambda t, options: {"y": oracles.rms_norm(t["x"], t["weight"], **options)},
        gradients={"x": "dx", "weight": "dweight"},
    ),
    "rope": Form(
        op="rope",
        call=_rope,
        golden=rope,
        oracle=_oracle_rope,
        gradients={"q": "dq", "k": "dk"},
        reaches={"q": ("q_out",), "k": ("k_out",)},
        always_float32=frozenset({"cos", "sin"}),
        alike=("q", "k"),
    ),
    "swiglu": Form(
        op="swiglu",
        call=_swiglu,
        golden=swiglu,
        oracle=lambda t, options: {"y": oracles.swiglu(t["gate"], t["up"])},
        gradients={"gate": "dgate", "up": "dup"},
        alike=("gate", "up"),
    ),
    "loss": Form(
        op="loss",
        call=_loss,
        golden=loss,
        oracle=_oracle_loss,
        gradients={"hidden": "dhidden", "weight": "dweight"},
        always_float32=frozenset({"loss"}),
    ),
}
