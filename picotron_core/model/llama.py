"""Llama: the decoder, its head, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from picotron_core.model.architecture import Architecture
from picotron_core.model.attention import Attention
from picotron_core.model.embedding import Embed, embed
from picotron_core.model.kv_cache import KVCache
from picotron_core.model.mlp import MLP
from picotron_core.model.norm import RMSNorm
from picotron_core.model.rope import RopeTables
from picotron_core.ops import Ops
from picotron_core.ops.loss import IGNORE_INDEX


class Layer(nn.Module):
    """x + attention(norm(x)), then the same with the MLP: (B, T, E) -> (B, T, E)."""

    def __init__(self, architecture: Architecture, ops: Ops, *, layer: int) -> None:
        super().__init__()
        E, eps = architecture.hidden_size, architecture.rms_norm_eps
        self.input_layernorm = RMSNorm(E, eps=eps, norm=ops.norm)
        self.self_attn = Attention(
            architecture, layer=layer, attention=ops.attention, rope=ops.rope
        )
        self.post_attention_layernorm = RMSNorm(E, eps=eps, norm=ops.norm)
        self.mlp = MLP(architecture, swiglu=ops.swiglu)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, doc_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, doc_ids, cache)
        hidden: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return hidden


class Decoder(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, E) after the final norm."""

    def __init__(self, architecture: Architecture, ops: Ops) -> None:
        super().__init__()
        E = architecture.hidden_size
        self.embed_tokens = nn.Embedding(architecture.vocab_size, E)
        self.embed: Embed = embed
        self.layers = nn.ModuleList(
            Layer(architecture, ops, layer=layer) for layer in range(architecture.num_hidden_layers)
        )
        self.norm = RMSNorm(E, eps=architecture.rms_norm_eps, norm=ops.norm)
        self.rope_tables = RopeTables(architecture)

    def forward(self, input_ids: Tensor, doc_ids: Tensor | None, cache: KVCache | None) -> Tensor:
        start = 0 if cache is None else cache.length
        cos, sin = self.rope_tables(start, input_ids.shape[1], input_ids.device)
        x = self.embed(input_ids, self.embed_tokens.weight)
        for layer in self.layers:
            x = layer(x, cos, sin, doc_ids, cache)
        hidden: Tensor = self.norm(x)
        return hidden


class Llama(nn.Module):
    """A Llama whose parameters bear Hugging Face's names and whose hot ops are `ops`'.

    A new one holds torch's default values: follow it with `initialise` or `load_weights`. A large
    one is quicker to build under `torch.device("meta")` and `.to_empty(device=...)`. It may be cast
    to bfloat16 as a whole; the rotary tables stay float32.

    Touvron et al. 2023 (arXiv:2302.13971) section 2.2.
    """

    def __init__(self, architecture: Architecture, ops: Ops) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = Decoder(architecture, ops)
        self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)
        self.loss_of = ops.loss
        self.tie()

    def tie(self) -> None:
        """Make a tied head the embedding's weight, after either was replaced."""
        if self.architecture.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Llama:
        # Leaving the meta device makes new Parameters, one for each name: tie them again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def forward(
        self, input_ids: Tensor, *, doc_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """The hidden states that the head reads.

        Args:
            input_ids: (B, T) integers in [0, V).
            doc_ids: (B, T) integers; a token attends only within its own document.
            cache: the tokens come after those in it, and are added to it.

        Returns: (B, T, E), dtype of the parameters.
        Raises: ValueError beyond max_position_embeddings, or for doc_ids together with a cache.
        """
        if doc_ids is not None and cache is not None:
            raise ValueError(
                "doc_ids with a KV cache: the cache does not keep its tokens' documents"
            )
        hidden: Tensor = self.model(input_ids, doc_ids, cache)
        return hidden

    def reads(self) -> dict[nn.Module, list[str]]:
        """The modules that are called, in the order of forward, and the parameters that must be
        there by then; each parameter once.
        """
        modules: list[tuple[nn.Module, Sequence[str]]] = [
            (self.model, ["model.embed_tokens."]),
            *((layer, [f"model.layers.{n}."]) for n, layer in enumerate(self.model.layers)),
            (self.model.norm, ["model.norm.", "lm_head."]),
        ]
        names = [name for name, _ in self.named_parameters()]
        return {
            module: [name for name in names if name.startswith(tuple(prefixes))]
            for module, prefixes in modules
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., V), same dtype."""
        return F.linear(hidden, self.lm_head.weight)

    def loss(self, input_ids: Tensor, targets: Tensor, *, doc_ids: Tensor | None = None) -> Tensor:
        """The sum, not the mean, of the cross-entropy over all targets but IGNORE_INDEX.

        Args:
            input_ids, doc_ids: as in `forward`.
            targets: (B, T) int64; targets[b, t] is the token that follows input_ids[b, t].

        Returns: () float32, in nats.
        """
        hidden = self(input_ids, doc_ids=doc_ids).flatten(0, 1)
        return self.loss_of(
            hidden, self.lm_head.weight, targets.flatten(), ignore_index=IGNORE_INDEX
        )
