"""The learning rate as a function of the step, and what a resume changes of it."""

from __future__ import annotations

import math

from picotron_core.bounds import STEPS
from picotron_core.schema import Train

# The settings that decide the rate.
DECIDES = (
    "steps",
    "decay_steps",
    "lr",
    "min_lr_ratio",
    "schedule",
    "warmup_steps",
    "decay_fraction",
)


def learning_rate(step: int, train: Train) -> float:
    """The rate of update number `step` (1 is the first): linear warmup to `lr`, then decay.

    cosine and linear fall from the end of the warmup to the decay's last step; wsd (warmup, stable,
    decay: arXiv:2404.06395 section 4) holds `lr` and falls linearly over the last `decay_fraction`
    of these steps. All end at lr * min_lr_ratio, which later steps keep.
    """
    end = _end(train)
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "wsd":
        start = max(train.warmup_steps, round(end * (1 - train.decay_fraction)))
    else:
        start = train.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if train.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * remaining)


def _end(train: Train) -> int:
    """The step at which the decay ends."""
    return train.decay_steps or train.steps


def changed_plan(before: Train, now: Train, step: int) -> str:
    """How the rate after `step` changes where a run that began with `before` goes on with `now`:
    a sentence, or "" where every later step has the rate that it had.
    """
    if _plan(before) == _plan(now):
        return ""
    changes = [
        f"train.{name} {getattr(before, name)} -> {getattr(now, name)}"
        for name in DECIDES
        if getattr(before, name) != getattr(now, name)
    ]
    was, is_now = (learning_rate(step + 1, plan) for plan in (before, now))
    how = f"goes from {was:.2e} to {is_now:.2e}" if was != is_now else f"is {was:.2e} as before"
    kept = now.model_copy(update={"decay_steps": _end(before)})
    keep = ""
    if _plan(kept) == _plan(before):
        keep = f" To keep the former plan: --train.decay_steps {kept.decay_steps}."
    return (
        f"the learning-rate plan changes: {', '.join(changes)}: at step {step + 1} the rate {how}."
        f"{keep}"
    )


def _plan(train: Train) -> tuple[object, ...]:
    fraction = train.decay_fraction if train.schedule == "wsd" else None
    kept = (train.lr, train.min_lr_ratio, train.schedule, train.warmup_steps)
    return (*kept, _end(train), fraction)


def flags_to_go_on(train: Train) -> str:
    """The flags by which a finished run trains twice as long, at the rate with which it ended; ""
    where that is 0, and going on would change nothing.
    """
    if not learning_rate(train.steps, train):
        return ""
    flags = f"--train.steps {min(2 * train.steps, STEPS)}"
    if train.decay_steps or train.warmup_steps >= train.steps:  # more steps do not change the plan
        return flags
    return f"{flags} --train.decay_steps {train.steps}"
