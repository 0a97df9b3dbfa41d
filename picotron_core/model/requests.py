"""What a run will ask of each op, so that backends are chosen before anything runs."""

from __future__ import annotations

from picotron_core.hardware import Device
from picotron_core.model.architecture import Architecture
from picotron_core.registry.types import Request


def requests(
    architecture: Architecture,
    *,
    device: Device,
    dtype: str,
    seq_len: int,
    micro_batch: int,
    document_mask: bool,
    training: bool,
    world_size: int,
    network: Device | None = None,
    context: int = 1,
) -> list[Request]:
    """One request per op and way of calling it; every op in training, the forward's in generation.

    Sizes go by the letters of `picotron_core.ops.attention`, and F is the MLP's width.

    Args:
        dtype: torch's name of the compute dtype. The optimizer and the collectives are asked for
            in float32, the dtype of master weights and of gradients in flight.
        seq_len: tokens per sequence; in generation, the most that a sequence may reach.
        training: False asks for what `generate` calls: no loss, optimizer or comm, but attention
            of one token to all before it as well (feature `cross_length`).
        context: ranks that each sequence is divided among: attention is asked for in parts.
        network: the real device, whose collectives run, where `device` is simulated.
    """
    B, T = micro_batch, seq_len // context
    E, F, V = architecture.hidden_size, architecture.intermediate_size, architecture.vocab_size
    H, K = architecture.num_attention_heads, architecture.num_key_value_heads
    D = architecture.head_dim

    def ask(
        op: str, *features: str, dtype: str = dtype, device: Device = device, **sizes: int
    ) -> Request:
        return Request(
            op=op,
            device=device,
            dtype=dtype,
            training=training,
            features=frozenset(features),
            sizes=sizes,
        )

    features = ["causal"]
    if H != K:
        features.append("gqa")
    if document_mask:
        features.append("doc_ids")
    if context > 1:
        features += ["lse", "lse_backward"]
    asked = [
        ask("attention", *features, B=B, H=H, K=K, T=T, S=T, D=D),
        ask("norm", N=B * T, E=E),
        ask("rope", B=B, H=H, K=K, T=T, D=D),
        ask("swiglu", N=B * T, F=F),
    ]
    if context > 1:  # of the keys that came from other ranks: see `parallel/context.py`
        part = [feature for feature in features if feature != "causal"]
        part += ["cross_length", *(["query_doc_ids"] if document_mask else [])]
        asked.append(ask("attention", *part, B=B, H=H, K=K, T=T, S=T // 2, D=D))
        asked.append(ask("attention", *part, B=B, H=H, K=K, T=T // 2, S=T, D=D))
    if not training:
        return [*asked, ask("attention", *features, "cross_length", B=B, H=H, K=K, T=1, S=T, D=D)]
    return [
        *asked,
        ask("loss", N=B * T, E=E, V=V),
        ask("optimizer", dtype="float32"),
        ask("comm", dtype="float32", device=network or device, world=world_size),
    ]
