"""Interleaved 1F1B: each stage has several chunks of layers, far apart (Narayanan et al. 2021,
arXiv:2104.04473, section 2.2).

With v chunks a stage, rank r has chunks r, r + p, r + 2p, ... of the p v that the layers are cut
into. A micro-batch goes around the ranks v times; the turns are v times as short, and so is the
time in which a stage waits for its first, at the price of v times as many messages.
"""

from __future__ import annotations

from picotron_core.errors import ConfigError
from picotron_core.parallel.schedules.action import Action, backward, forward


def order(*, stage: int, stages: int, micro_batches: int, chunks: int) -> list[Action]:
    """1F1B over (micro-batch, chunk) pairs: p micro-batches through one chunk, then the next chunk.

    Raises: ConfigError where the micro-batches are no multiple of the stages.
    """
    if micro_batches % stages:
        raise ConfigError(
            f"parallel.schedule = 'interleaved' sends micro-batches in groups of {stages}, one for "
            f"each stage, but train.accumulation is {micro_batches}. Use --train.accumulation "
            f"{-(-micro_batches // stages) * stages}, or --parallel.schedule 1f1b."
        )
    turns = []  # (micro-batch, chunk) in the order of forward
    for first in range(0, micro_batches, stages):
        for chunk in range(chunks):
            turns += [(m, chunk) for m in range(first, first + stages)]
    back = [(m, chunks - 1 - chunk) for m, chunk in turns]
    ahead = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(turns))
    actions = [forward(*turn) for turn in turns[:ahead]]
    for number, turn in enumerate(turns[ahead:]):
        actions += [forward(*turn), backward(*back[number])]
    return actions + [backward(*turn) for turn in back[len(turns) - ahead :]]
