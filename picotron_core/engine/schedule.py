"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from picotron_core.schema import Train


def learning_rate(step: int, train: Train) -> float:
    """The rate of update number `step` (1 is the first): linear warmup to `lr`, then decay.

    cosine and linear fall from the end of the warmup to the last step; wsd (warmup, stable, decay:
    arXiv:2404.06395 section 4) holds `lr` and falls linearly over the last `decay_fraction`.
    All end at lr * min_lr_ratio.
    """
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "wsd":
        start = max(train.warmup_steps, round(train.steps * (1 - train.decay_fraction)))
    else:
        start = train.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, train.steps - start)))
    if train.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * remaining)
