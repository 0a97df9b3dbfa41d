"""The keys and values of the tokens so far, so that each is computed once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from picotron_core.model.architecture import Architecture


@dataclass(slots=True)
class KVCache:
    """Room for `max_len` tokens of every layer, allocated once.

    keys, values: per layer (B, K, max_len, D). filled: per layer, how many tokens it holds.
    """

    keys: list[Tensor]
    values: list[Tensor]
    filled: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.filled = [0] * len(self.keys)

    @property
    def length(self) -> int:
        """Tokens that every layer holds; between two forwards all hold the same."""
        return min(self.filled)

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, D) after what the layer holds; views of all it holds now.

        Raises: ValueError when they do not fit, or when they carry a gradient: the next append
            would overwrite what a backward still needs.
        """
        if k.requires_grad:
            raise ValueError("A KV cache is for inference: run under torch.inference_mode()")
        start, end = self.filled[layer], self.filled[layer] + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit a KV cache of max_len={self.max_len}")
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        self.filled[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def empty_cache(
    architecture: Architecture,
    *,
    batch: int,
    max_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> KVCache:
    """A cache that holds nothing yet, for `batch` sequences of up to `max_len` tokens."""
    shape = (batch, architecture.num_key_value_heads, max_len, architecture.head_dim)

    def room() -> list[Tensor]:
        layers = range(architecture.num_hidden_layers)
        return [torch.empty(shape, device=device, dtype=dtype) for _ in layers]

    return KVCache(room(), room())
