"""AFAB, all forwards and then all backwards (GPipe: Huang et al. 2019, arXiv:1811.06965).

    stage 0 | F0 F1 F2 F3                   B0 B1 B2 B3
    stage 1 |    F0 F1 F2 F3             B0 B1 B2 B3
    stage 2 |       F0 F1 F2 F3       B0 B1 B2 B3
    stage 3 |          F0 F1 F2 F3 B0 B1 B2 B3

Of m micro-batches over p stages, a stage idles p - 1 of m + p - 1 turns; and it keeps the
activations of all m micro-batches.
"""

from __future__ import annotations

from picotron_core.parallel.schedules.action import Action, backward, forward


def order(*, stage: int, stages: int, micro_batches: int) -> list[Action]:
    """The stage's actions; all stages have the same."""
    every = range(micro_batches)
    return [*map(forward, every), *map(backward, every)]
