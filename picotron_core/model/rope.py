"""The rotary tables: the cosine and sine of every position's angles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from picotron_core.model.architecture import Architecture


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """Angle per position of each pair i: theta^(-2i/D), stretched as the scaling says.

    Returns: (D/2,) float32 on the CPU.
    Source: Su et al. 2021 (arXiv:2104.09864) section 3.3; Grattafiori et al. 2024
        (arXiv:2407.21783) for Llama 3, whose blend is only written down in its released code.
    """
    D = architecture.head_dim
    exponent = torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D
    frequency = 1.0 / architecture.rope_theta**exponent
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # How often a pair turns within the context that it was trained on decides how far it can be
    # trusted: fast pairs have seen every angle, slow ones must be squeezed into what they saw.
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    trust = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - trust) * frequency / scaling.factor + trust * frequency


def rope_tables(architecture: Architecture, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inverse frequency: (length, D/2) float32 on the CPU, each."""
    position = torch.arange(length, dtype=torch.float32, device="cpu")
    angle = position[:, None] * inverse_frequencies(architecture)[None, :]
    return angle.cos(), angle.sin()


Tables = Callable[[int, int, torch.device], tuple[Tensor, Tensor]]  # RopeTables, or what is like it


class RopeTables:
    """The tables of the longest sequence so far, on the device where they were last asked for.

    Not buffers: `module.to(torch.bfloat16)` would round them. Computed on the CPU, so that every
    device reads the same bits.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.cos = self.sin = torch.empty(0, architecture.head_dim // 2, device="cpu")

    def __call__(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start .. start + length - 1: (length, D/2) float32 on `device`.

        Raises: ValueError beyond max_position_embeddings.
        """
        end, limit = start + length, self.architecture.max_position_embeddings
        if end > limit:
            raise ValueError(
                f"A sequence of {end} tokens is longer than max_position_embeddings = {limit}: "
                "shorten it, or use a model with a longer context"
            )
        if end > len(self.cos) or self.cos.device != device:
            # By powers of two, so that a sequence that grows token by token seldom comes here; and
            # outside inference mode, whose tensors no later backward could use.
            rows = min(limit, max(len(self.cos), 1 << (end - 1).bit_length()))
            with torch.inference_mode(False):
                cos, sin = rope_tables(self.architecture, rows)
                self.cos, self.sin = cos.to(device), sin.to(device)
        return self.cos[start:end], self.sin[start:end]
