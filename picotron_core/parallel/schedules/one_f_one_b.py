"""1F1B: as soon as a micro-batch can go back it does (Narayanan et al. 2019, PipeDream-flush:
arXiv:2006.09503, section 2.2).

    stage 0 | F0 F1 F2 F3          B0 F4 B1 F5 B2    B3    B4    B5
    stage 1 |    F0 F1 F2       B0 F3 B1 F4 B2 F5 B3    B4    B5
    stage 2 |       F0 F1    B0 F2 B1 F3 B2 F4 B3 F5 B4    B5
    stage 3 |          F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5

As idle as AFAB, but stage s keeps the activations of at most p - s micro-batches.
"""

from __future__ import annotations

from picotron_core.parallel.schedules.action import Action, backward, forward


def order(*, stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Enough forwards to keep the later stages busy, then one backward after each forward."""
    ahead = min(stages - stage - 1, micro_batches)
    actions = [forward(m) for m in range(ahead)]
    for m in range(ahead, micro_batches):
        actions += [forward(m), backward(m - ahead)]
    return actions + [backward(m) for m in range(micro_batches - ahead, micro_batches)]
