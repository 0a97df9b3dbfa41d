"""Head and cross-entropy as their equation is written, with all (N, V) logits at once."""

from __future__ import annotations

import torch
from torch import Tensor


def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    valid = targets != ignore_index
    target = targets.masked_fill(~valid, 0)  # any index will do for a row that counts for nothing
    picked = logits.gather(-1, target[:, None]).squeeze(-1)
    return (logits.logsumexp(dim=-1) - picked).masked_fill(~valid, 0).sum().float()
