"""Windows of the token stream as batches: a pure function of step and rank.

Window w is the seq_len + 1 tokens from w * seq_len: its last target is the next one's first input,
so that every token but the first is a target exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from picotron_core.data.sampler import Sampler
from picotron_core.data.tokens import Ids
from picotron_core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """inputs, targets: (b, T) int64, the targets being the next tokens. doc_ids: (b, T) int32, the
    number of EOS before a position in its row (an EOS belongs to the document that it ends)."""

    inputs: torch.Tensor
    targets: torch.Tensor
    doc_ids: torch.Tensor | None


def num_windows(tokens: Ids, seq_len: int) -> int:
    """How many samples the stream holds.

    Raises: DataError if it is none.
    """
    windows = (len(tokens) - 1) // seq_len
    if windows < 1:
        raise DataError(
            f"A sequence of {seq_len} needs {seq_len + 1} tokens, but this side of the data (train "
            f"or validation) holds {len(tokens)}. Lower --data.seq_len, give more text with "
            "--data.paths, or change --data.val_fraction."
        )
    return windows


def batch(
    tokens: Ids,
    sampler: Sampler,
    *,
    seq_len: int,
    step: int,
    global_batch: int,
    micro_batch: int,
    micro_batch_index: int = 0,
    rank: int = 0,
    world_size: int = 1,
    eos_id: int | None = None,
) -> Batch:
    """One micro-batch of one rank.

    Step s is made of samples s * global_batch ... (s + 1) * global_batch - 1, whatever the number
    of ranks: rank r has the r-th of world_size equal runs of them, in order of its micro-batches.

    Args:
        global_batch: samples a step, over all ranks and micro-batches.
        eos_id: where documents end; None makes no doc_ids.

    Raises: ConfigError if the ranks and micro-batches do not divide the global batch.
    """
    if global_batch % (world_size * micro_batch):
        raise ConfigError(
            f"A global batch of {global_batch} samples is not a whole number of micro-batches of "
            f"{micro_batch} on each of {world_size} ranks. Change --train.micro_batch."
        )
    per_rank = global_batch // world_size
    if not (0 <= rank < world_size and 0 <= micro_batch_index < per_rank // micro_batch):
        raise ConfigError(
            f"No micro-batch {micro_batch_index} on rank {rank}: there are "
            f"{per_rank // micro_batch} on each of {world_size} ranks."
        )
    if sampler.num_samples > num_windows(tokens, seq_len):
        raise ConfigError(
            f"The sampler orders {sampler.num_samples} samples, but the data holds "
            f"{num_windows(tokens, seq_len)} of {seq_len} tokens. Make it from num_windows()."
        )
    start = step * global_batch + rank * per_rank + micro_batch_index * micro_batch
    windows = sampler.samples(start, micro_batch).tolist()
    return _gather(tokens, windows, seq_len, eos_id)


def validation_batches(
    tokens: Ids,
    *,
    seq_len: int,
    samples: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    eos_id: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the windows that a run is evaluated on, the same ones every time.

    Args:
        samples: how many windows, over all ranks; they lie evenly over the stream, since its
            beginning alone would be a few documents. All windows where there are fewer.

    Raises: DataError if there is not one window.
    """
    windows = num_windows(tokens, seq_len)
    count = min(samples, windows)
    chosen = [i * windows // count for i in range(count)]
    starts = range(rank * micro_batch, count, world_size * micro_batch)
    return (_gather(tokens, chosen[i : i + micro_batch], seq_len, eos_id) for i in starts)


def _gather(tokens: Ids, windows: Sequence[int], seq_len: int, eos_id: int | None) -> Batch:
    rows = np.stack([tokens[w * seq_len : (w + 1) * seq_len + 1] for w in windows])
    ids = torch.from_numpy(rows.astype(np.int64))
    inputs = ids[:, :-1].contiguous()
    doc_ids = None
    if eos_id is not None:
        ends = (inputs == eos_id).int()
        doc_ids = ends.cumsum(dim=1, dtype=torch.int32) - ends
    return Batch(inputs=inputs, targets=ids[:, 1:].contiguous(), doc_ids=doc_ids)
