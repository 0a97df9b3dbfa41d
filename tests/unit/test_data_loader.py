"""Batches: the same samples on any number of ranks, next tokens as targets, documents counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from picotron_core.data.loader import batch, num_windows, validation_batches
from picotron_core.data.sampler import Sampler
from picotron_core.errors import ConfigError, DataError

EOS = 0
T = 7
TOKENS = np.random.default_rng(0).integers(0, 300, size=500).astype(np.uint16)
TOKENS[::11] = EOS
SAMPLER = Sampler(num_windows(TOKENS, T), seed=5)


def rows(step: int, ranks: int, accumulation: int, global_batch: int = 24) -> list[list[int]]:
    """Every row (T inputs and the last target) of a step, rank by rank."""
    micro_batch = global_batch // ranks // accumulation
    found = []
    for rank in range(ranks):
        for index in range(accumulation):
            part = batch(
                TOKENS,
                SAMPLER,
                seq_len=T,
                step=step,
                global_batch=global_batch,
                micro_batch=micro_batch,
                micro_batch_index=index,
                rank=rank,
                world_size=ranks,
            )
            assert part.inputs.shape == part.targets.shape == (micro_batch, T)
            found += torch.cat([part.inputs, part.targets[:, -1:]], dim=1).tolist()
    return found


@pytest.mark.parametrize(
    ("ranks", "accumulation"), [(1, 4), (2, 1), (2, 3), (3, 2), (8, 1), (4, 6)]
)
def test_a_step_is_the_same_samples_on_any_number_of_ranks(ranks, accumulation):
    for step in (0, 1, 5):  # 71 windows: step 5 spans two epochs
        assert rows(step, ranks, accumulation) == rows(step, 1, 1)


def test_steps_are_the_windows_in_the_sampler_s_order():
    wanted = [TOKENS[w * T : w * T + T + 1].tolist() for w in SAMPLER.samples(0, 72).tolist()]
    assert rows(0, 1, 1) + rows(1, 1, 1) + rows(2, 1, 1) == wanted


def test_targets_are_the_next_tokens():
    made = batch(TOKENS, SAMPLER, seq_len=T, step=3, global_batch=4, micro_batch=4)
    assert made.inputs.dtype == made.targets.dtype == torch.int64
    assert made.inputs.is_contiguous()
    assert made.targets.is_contiguous()
    assert made.doc_ids is None
    for row, window in enumerate(SAMPLER.samples(12, 4).tolist()):
        assert made.inputs[row].tolist() == TOKENS[window * T :][:T].tolist()
        assert made.targets[row].tolist() == TOKENS[window * T + 1 :][:T].tolist()


def test_doc_ids_count_the_ends_before_a_position():
    tokens = np.array([9, EOS, 8, 7, EOS, EOS, 6, 5], dtype=np.uint32)
    (made,) = validation_batches(tokens, seq_len=7, samples=9, micro_batch=1, eos_id=EOS)
    assert made.doc_ids is not None
    assert made.doc_ids.dtype == torch.int32
    #                                  9  E  8  7  E  E  6
    assert made.doc_ids.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    made = batch(TOKENS, SAMPLER, seq_len=T, step=0, global_batch=8, micro_batch=8, eos_id=EOS)
    assert made.doc_ids is not None
    for row, ids in zip(made.inputs.tolist(), made.doc_ids.tolist(), strict=True):
        assert ids == [row[:t].count(EOS) for t in range(T)]


def test_large_ids_survive():
    tokens = np.array([2**32 - 1, 0, 2**31, 65_536], dtype=np.uint32)
    (made,) = validation_batches(tokens, seq_len=3, samples=2, micro_batch=2)
    assert made.inputs.tolist() == [[2**32 - 1, 0, 2**31]]
    assert made.targets.tolist() == [[0, 2**31, 65_536]]


def test_validation_is_every_window_once_in_order():
    batches = list(validation_batches(TOKENS, seq_len=T, samples=99, micro_batch=20))
    assert [len(made.inputs) for made in batches] == [20, 20, 20, 11]
    inputs = torch.cat([made.inputs for made in batches]).flatten()
    targets = torch.cat([made.targets for made in batches]).flatten()
    assert inputs.tolist() == TOKENS[: 71 * T].tolist()
    assert targets.tolist() == TOKENS[1 : 71 * T + 1].tolist()


def test_fewer_validation_samples_lie_evenly_over_the_text():
    (few,) = validation_batches(TOKENS, seq_len=T, samples=4, micro_batch=20)
    starts = [TOKENS[window * T : (window + 1) * T].tolist() for window in (0, 17, 35, 53)]
    assert few.inputs.tolist() == starts


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 3), (2, 4), (3, 2), (5, 9)])
def test_the_validation_set_does_not_depend_on_the_layout(world_size, micro_batch):
    (whole,) = validation_batches(TOKENS, seq_len=T, samples=11, micro_batch=11)
    rows = []
    for rank in range(world_size):
        for made in validation_batches(
            TOKENS,
            seq_len=T,
            samples=11,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
        ):
            rows += made.inputs.tolist()
    assert sorted(rows) == sorted(whole.inputs.tolist())


@pytest.mark.parametrize(("size", "seq_len", "windows"), [(8, 7, 1), (14, 7, 1), (15, 7, 2)])
def test_windows_need_one_token_more_than_their_length(size, seq_len, windows):
    assert num_windows(TOKENS[:size], seq_len) == windows


def test_sequence_longer_than_the_data_is_an_error():
    message = r"A sequence of 7 needs 8 tokens, .* holds 7\. Lower --data\.seq_len"
    with pytest.raises(DataError, match=message):
        num_windows(TOKENS[:7], 7)
    with pytest.raises(DataError, match=message):
        validation_batches(TOKENS[:7], seq_len=7, samples=1, micro_batch=1)


def test_batches_that_do_not_divide_are_errors():
    def make(**changes: int) -> object:
        sizes = {"global_batch": 12, "micro_batch": 3, "world_size": 2, **changes}
        return batch(TOKENS, SAMPLER, seq_len=T, step=0, **sizes)

    make(rank=1, micro_batch_index=1)
    with pytest.raises(ConfigError, match=r"global batch of 10 .* micro-batches of 3 .* 2 ranks"):
        make(global_batch=10)
    with pytest.raises(ConfigError, match="No micro-batch 2 on rank 0"):
        make(micro_batch_index=2)
    with pytest.raises(ConfigError, match="on rank 2"):
        make(rank=2)
    with pytest.raises(ConfigError, match=r"orders 72 samples, but the data holds 71 of 7 tokens"):
        batch(TOKENS, Sampler(72, 0), seq_len=T, step=0, global_batch=1, micro_batch=1)
