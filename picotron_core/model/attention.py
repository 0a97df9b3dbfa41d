"""Self-attention: the projections around the op."""

from __future__ import annotations

from torch import Tensor, nn

from picotron_core import ops
from picotron_core.model.architecture import Architecture
from picotron_core.model.kv_cache import KVCache


class Attention(nn.Module):
    """(B, T, E) -> (B, T, E): each token gathers from the tokens before it and itself."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        layer: int,
        attention: ops.Attention,
        rope: ops.Rope,
    ) -> None:
        super().__init__()
        E, D = architecture.hidden_size, architecture.head_dim
        H, K = architecture.num_attention_heads, architecture.num_key_value_heads
        self.q_proj = nn.Linear(E, H * D, bias=False)
        self.k_proj = nn.Linear(E, K * D, bias=False)
        self.v_proj = nn.Linear(E, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, E, bias=False)
        self.head_dim = D
        self.layer = layer
        self.attention = attention
        self.rope = rope

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, doc_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        q = self._heads(self.q_proj(x))
        k = self._heads(self.k_proj(x))
        v = self._heads(self.v_proj(x))
        q, k = self.rope(q, k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = self.attention(q, k, v, causal=True, doc_ids=doc_ids)
        hidden: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return hidden

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D); however many heads a shard of the weight has."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
