"""The learning rate against torch's own schedulers and by its corner points."""

import math
from itertools import pairwise

import pytest
import torch

from picotron_core.engine.schedule import changed_plan, flags_to_go_on, learning_rate
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_decay_that_ends_before_the_run_keeps_its_last_rate(schedule):
    short = rates(schedule=schedule, steps=100, warmup_steps=10, lr=1.0)
    long = rates(schedule=schedule, steps=150, decay_steps=100, warmup_steps=10, lr=1.0)
    assert long == short + [short[-1]] * 50
    part = rates(schedule=schedule, steps=60, decay_steps=100, warmup_steps=10, lr=1.0)
    assert part == short[:60]


def plan_of(flags, train):
    words = flags.split()
    given = zip(words[::2], words[1::2], strict=True)
    return train.model_copy(update={key.removeprefix("--train."): int(v) for key, v in given})


@pytest.mark.parametrize(
    "fields",
    [
        *({"schedule": schedule, "steps": 100, "warmup_steps": 10} for schedule in SCHEDULES),
        {"steps": 1, "warmup_steps": 0},
        {"steps": 10, "warmup_steps": 50},
        {"steps": 10, "warmup_steps": 10},
        {"steps": 10, "warmup_steps": 9},
        {"steps": 60, "decay_steps": 100},
        {"steps": 100, "decay_steps": 60},
        {"steps": 10**9, "warmup_steps": 1},
        {"steps": 40, "min_lr_ratio": 1.0},
    ],
)
def test_the_suggestion_of_a_finished_run_does_not_make_the_rate_jump(fields):
    train = Train(lr=1.0, **fields)
    further = plan_of(flags_to_go_on(train), train)
    steps = train.steps
    assert further.steps == min(2 * steps, 10**9)
    assert learning_rate(steps, further) == learning_rate(steps, train)
    shown = range(steps, min(further.steps, steps + 1000) + 1)
    found = [learning_rate(step, further) for step in shown]
    jumps = [abs(b - a) for a, b in pairwise(found)]
    assert max(jumps, default=0) <= max(0.2, 2 / steps)
    assert changed_plan(train, further, steps) == "" or train.warmup_steps >= steps


def test_a_rate_that_ended_at_zero_is_not_gone_on_with():
    assert flags_to_go_on(Train(steps=100, min_lr_ratio=0.0)) == ""


CHANGES = {
    "more steps": ({"steps": 1600}, "train.steps 800 -> 1600: at step 801 the rate goes from "),
    "fewer steps": ({"steps": 900}, "train.steps 800 -> 900: at step 801 "),
    "another rate": ({"lr": 2e-3}, "train.lr 0.001 -> 0.002: at step 801 the rate goes from 1.00e"),
    "another shape": ({"schedule": "linear", "steps": 1000}, "train.schedule cosine -> linear"),
    "another warmup": ({"warmup_steps": 900}, "train.warmup_steps 50 -> 900"),
    "another end": ({"min_lr_ratio": 0.5}, "train.min_lr_ratio 0.1 -> 0.5"),
    "a later decay": ({"decay_steps": 2000}, "train.decay_steps 0 -> 2000"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_says_what_it_changes_of_the_plan(change):
    before = Train(steps=800)
    fields, wanted = CHANGES[change]
    said = changed_plan(before, before.model_copy(update=fields), 800)
    assert said.startswith("the learning-rate plan changes: ")
    assert wanted in said
    assert "\n" not in said


def test_the_former_plan_can_be_kept_and_is_no_change():
    before = Train(steps=800)
    said = changed_plan(before, Train(steps=1600), 800)
    assert (
        "goes from 1.00e-04 to 5.72e-04. To keep the former plan: --train.decay_steps 800" in said
    )
    assert changed_plan(before, Train(steps=1600, decay_steps=800), 800) == ""
    assert changed_plan(before, Train(steps=800, decay_fraction=0.5), 400) == ""  # of wsd alone
    assert changed_plan(before, Train(steps=800, clip=0.5), 400) == ""


def test_a_plan_that_changes_later_says_so():
    before = Train(steps=800, warmup_steps=100)
    said = changed_plan(before, Train(steps=1600, warmup_steps=100), 50)
    assert "at step 51 the rate is 5.10e-04 as before" in said
