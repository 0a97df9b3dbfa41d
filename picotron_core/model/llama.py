"""Llama: the decoder, its head, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_core.model.architecture import Architecture
from picotron_core.model.attention import Attention
from picotron_core.model.embedding import Embed, embed
from picotron_core.model.kv_cache import KVCache
from picotron_core.model.mlp import MLP
from picotron_core.model.norm import RMSNorm
from picotron_core.model.rope import RopeTables, Tables
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
    """Token ids (B, T) -> hidden states (B, T, E) after the final norm.

    A pipeline stage has some of the layers, under the numbers that they have in the whole model.
    """

    def __init__(self, architecture: Architecture, ops: Ops) -> None:
        super().__init__()
        E = architecture.hidden_size
        # Not drawn: on the meta device torch would load its compiler for that, for three seconds.
        zeros = torch.zeros(architecture.vocab_size, E)
        self.embed_tokens = nn.Embedding(architecture.vocab_size, E, _weight=zeros)
        self.embed: Embed = embed
        self.last = architecture.num_hidden_layers - 1
        self.layers = nn.ModuleDict(
            {str(n): Layer(architecture, ops, layer=n) for n in range(self.last + 1)}
        )
        self.norm = RMSNorm(E, eps=architecture.rms_norm_eps, norm=ops.norm)
        self.rope_tables: Tables = RopeTables(architecture)

    def forward(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None,
        cache: KVCache | None,
        hidden: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        layers = range(self.last + 1) if layers is None else layers
        start = 0 if cache is None else cache.length
        cos, sin = self.rope_tables(start, input_ids.shape[1], input_ids.device)
        x = self.embed(input_ids, self.embed_tokens.weight) if hidden is None else hidden
        for number in layers:
            x = self.layers[str(number)](x, cos, sin, doc_ids, cache)
        return self.norm(x) if self.last in layers else x


class Llama(nn.Module):
    """A Llama whose parameters bear Hugging Face's names and whose hot ops are `ops`'.

    A new one holds no values to train from: follow it with `initialise` or `load_weights`. Under
    `torch.device("meta")` it takes no memory until `.to_empty(device=...)`, or `init.put`. It may
    be cast to bfloat16 as a whole; the rotary tables stay float32.

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
        if self.architecture.tie_word_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Llama:
        # Leaving the meta device makes new Parameters, one for each name: tie them again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def forward(
        self,
        input_ids: Tensor,
        *,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        hidden: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """The hidden states that the head reads.

        Args:
            input_ids: (B, T) integers in [0, V).
            doc_ids: (B, T) integers; a token attends only within its own document.
            cache: the tokens come after those in it, and are added to it.
            hidden: (B, T, E), in place of the embeddings: what the layers before made of them.
            layers: the numbers of those to go through; None is all.

        Returns: (B, T, E), dtype of the parameters.
        Raises: ValueError beyond max_position_embeddings, or for doc_ids together with a cache.
        """
        if doc_ids is not None and cache is not None:
            raise ValueError(
                "doc_ids with a KV cache: the cache does not keep its tokens' documents"
            )
        out: Tensor = self.model(input_ids, doc_ids, cache, hidden, layers)
        return out

    def reads(self) -> dict[nn.Module, list[str]]:
        """The modules that are called, in the order of forward, and the parameters that must be
        there by then; each parameter once.
        """
        embedding = ["model.embed_tokens."]
        embeds = "0" in self.model.layers  # a last stage has a tied one for the head alone
        modules: list[tuple[nn.Module, Sequence[str]]] = [
            (self.model, embedding if embeds else []),
            *((layer, [f"model.layers.{n}."]) for n, layer in self.model.layers.items()),
        ]
        if hasattr(self, "lm_head"):
            head = ["model.norm.", "lm_head."]
            modules.append((self.model.norm, head if embeds else [*head, *embedding]))
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
        return self.loss_after(self(input_ids, doc_ids=doc_ids), targets)

    def loss_after(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """As `loss`, from what `forward` returned."""
        weight, flat = self.lm_head.weight, hidden.flatten(0, 1)
        return self.loss_of(flat, weight, targets.flatten(), ignore_index=IGNORE_INDEX)

    def keep(self, layers: Collection[int], *, embedding: bool, head: bool) -> None:
        """Drop all but these layers, and the embedding or the norm and the head with it.

        A tied head keeps the embedding's weight under the embedding's name.
        """
        decoder, tied = self.model, self.architecture.tie_word_embeddings
        for number in set(map(int, decoder.layers)) - set(layers):
            del decoder.layers[str(number)]
        if not (embedding or (head and tied)):
            del decoder.embed_tokens
        if not head:
            del decoder.norm, self.lm_head
