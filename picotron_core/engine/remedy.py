"""What to change where a run does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from picotron_core.engine.kernel_memory import Work
from picotron_core.engine.memory import fits, needed

SHORTEST = 32  # tokens: a model of shorter sequences is hardly what was wanted
GAIN = 0.02  # of what is needed: other kernels are not proposed for less


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Flags that make a run fit, and the bytes that it then needs."""

    flags: str
    needed: int


def remedies(work: Work, lean_ops: Sequence[str]) -> list[Remedy]:
    """The mildest changes that make it fit: other kernels, a smaller micro-batch, both, or also
    shorter sequences; none where not even those do.
    """
    lean, backends = _leaner(work, lean_ops)
    found = [*_fitting(lean, [backends]), *_smaller(work, [])]
    if not found and backends:
        found = _smaller(lean, [backends])
    seq_len = work.seq_len // 2
    while not found and seq_len >= SHORTEST:
        shorter = replace(lean, seq_len=seq_len)
        flags = [backends, f"--data.seq_len {seq_len}"]
        found = [*_fitting(shorter, flags), *_smaller(shorter, flags)][:1]
        seq_len //= 2
    return found


def _leaner(work: Work, lean_ops: Sequence[str]) -> tuple[Work, str]:
    """With mem_efficient for those ops where it helps, and the flag for that."""
    rules = []
    for op in lean_ops:
        changed = replace(work, kernels={**work.kernels, op: "mem_efficient"})
        if needed(changed) < (1 - GAIN) * needed(work):
            work = changed
            rules.append(f"{op}=mem_efficient")
    return work, f"--backends '{';'.join(rules)}'" if rules else ""


def _smaller(work: Work, flags: Sequence[str]) -> list[Remedy]:
    """The largest micro-batch that fits, accumulated to the same number of samples."""
    samples = work.micro_batch * work.accumulation
    for micro_batch in range(work.micro_batch - 1, 0, -1):
        if samples % micro_batch == 0:
            accumulation = samples // micro_batch
            changed = replace(work, micro_batch=micro_batch, accumulation=accumulation)
            size = f"--train.micro_batch {micro_batch} --train.accumulation {accumulation}"
            if fitting := _fitting(changed, [*flags, size]):
                return fitting
    return []


def _fitting(work: Work, flags: Sequence[str]) -> list[Remedy]:
    given = " ".join(filter(None, flags))
    return [Remedy(flags=given, needed=needed(work))] if given and fits(work) else []
