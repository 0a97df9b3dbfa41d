"""The learning rate against torch's own schedulers and by its corner points."""

import math

import pytest
import torch

from picotron_core.engine.schedule import learning_rate
from picotron_core.schema import Train

SCHEDULES = ["cosine", "linear", "wsd"]


def rates(**fields):
    train = Train(**fields)
    return [learning_rate(step, train) for step in range(1, train.steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_peak_and_end(schedule):
    found = rates(schedule=schedule, steps=100, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(found) == found[9] == 2.0
    assert found[-1] == pytest.approx(0.2)
    assert sorted(found[9:], reverse=True) == found[9:]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_and_with_nothing_but_warmup(schedule):
    assert rates(schedule=schedule, steps=10, warmup_steps=0, lr=1.0)[0] <= 1.0
    assert rates(schedule=schedule, steps=4, warmup_steps=4, lr=1.0)[-1] == 1.0
    assert max(rates(schedule=schedule, steps=4, warmup_steps=8, lr=1.0)) == 0.5


def test_cosine_is_torchs():
    found = rates(schedule="cosine", steps=50, warmup_steps=0, lr=1.0, min_lr_ratio=0.25)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.25)
    wanted = []
    for _ in range(50):
        optimizer.step()
        scheduler.step()
        wanted.append(scheduler.get_last_lr()[0])
    assert found == pytest.approx(wanted)


def test_wsd_is_flat_until_its_decay():
    found = rates(
        schedule="wsd", steps=100, warmup_steps=10, lr=1.0, decay_fraction=0.3, min_lr_ratio=0.0
    )
    assert set(found[9:70]) == {1.0}
    assert found[70:] == pytest.approx([(30 - step) / 30 for step in range(1, 31)])
    assert math.isclose(found[-1], 0.0, abs_tol=1e-12)
