"""Saves in the background: one at a time, never of what is not finite, and the disk may refuse."""

from __future__ import annotations

import errno
import threading
from itertools import pairwise

import pytest
import torch
from small_state import saver, state_at

from picotron_core.checkpoint import interval as intervals
from picotron_core.checkpoint import save as saves
from picotron_core.checkpoint import task as tasks
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.interval import Interval
from picotron_core.checkpoint.load import find_checkpoint, load
from picotron_core.checkpoint.snapshot import available_bytes
from picotron_core.errors import NotSavedError, RunError


class Held(Disk):
    """Takes no byte until it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def write(self, descriptor, data):
        assert self.may.wait(60)
        return super().write(descriptor, data)


class Full(Disk):
    """Refuses writes as long as `error` is set."""

    error = errno.ENOSPC

    def write(self, descriptor, data):
        if self.error:
            raise OSError(self.error, "refused")
        return super().write(descriptor, data)


def move_on(state, step):
    """What an optimizer does: in place."""
    state.step = step
    for of in (state.masters, *state.moments.values()):
        for tensor in of.values():
            tensor.data.fill_(float(step))


def test_training_changes_the_state_while_the_copy_is_written(tmp_path):
    disk, state = Held(), state_at(1)
    saving = saver(state, tmp_path, disk=disk)
    assert saving.start()
    move_on(state, 2)
    assert saving.move_on() == ()
    assert saving.under_way
    assert not saving.start()  # one at a time, and the one that was not begun is counted
    assert saving.skipped == 1
    disk.may.set()
    assert not saving.finish()  # the state has moved on
    assert (saving.saved, saving.under_way) == (1, False)
    found = state_at(0)
    load(found, find_checkpoint(tmp_path))
    assert found.masters["weight"].unique().tolist() == [1.0]
    assert found.moments["exp_avg"]["weight"].unique().tolist() == [1.25]
    assert saving.save().name == "step-00000002"


def test_the_look_at_what_all_said_is_watched(tmp_path, monkeypatch):
    """On a GPU it waits for the ranks, of which one may be lost."""
    state, watched = state_at(1), []
    dog, real = state.layout.mesh.world.watchdog, torch.Tensor.tolist

    def look_at(tensor):
        watched.append(dog._waits is not None)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", look_at)
    assert saver(state, tmp_path).move_on(True, False) == (True, False)
    assert watched == [True]


def test_with_too_little_memory_it_waits_for_the_disk_instead(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("picotron_core.checkpoint.snapshot.available_bytes", lambda: 1000)
    state = state_at(1)
    saving = saver(state, tmp_path)
    assert saving.start()
    assert saving._snapshot.buffer is None
    assert "training waits for the disk" in caplog.text
    move_on(state, 2)  # too late to change what is written
    saving.finish()
    found = state_at(0)
    load(found, find_checkpoint(tmp_path))
    assert found.masters["weight"].unique().tolist() == [1.0]


def test_one_buffer_serves_every_save(tmp_path):
    state = state_at(1)
    saving = saver(state, tmp_path)
    saving.save()
    first = saving._snapshot.buffer.data_ptr()
    move_on(state, 2)
    saving.save()
    assert saving._snapshot.buffer.data_ptr() == first
    assert saving._snapshot.buffer.nbytes == 3 * 3 * 64 * 4


@pytest.mark.parametrize("what", ["masters", "moments"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path, caplog, what, value):
    saver(state_at(1), tmp_path).save()
    state = state_at(2)
    of = state.masters if what == "masters" else state.moments["exp_avg_sq"]
    of["weight"].data[1, 5] = value
    saving = saver(state, tmp_path)
    saving.start()
    assert not saving.finish()
    assert "a parameter or a moment is infinite or NaN" in caplog.text
    assert find_checkpoint(tmp_path).manifest.step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_costs_a_warning_until_it_does_so_too_often(tmp_path, caplog, error):
    disk, state = Full(), state_at(1)
    disk.error = 0
    saving = saver(state, tmp_path, disk=disk, max_misses=3)
    saving.save()
    disk.error = error
    for step in (2, 3):
        move_on(state, step)
        saving.start()
        assert not saving.finish()
        assert f"step-{step:08d}" in caplog.text
        assert "next save tries again" in caplog.text
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    disk.error = 0
    move_on(state, 4)
    saving.save()
    assert saving.misses == 0  # in a row is what counts
    disk.error = error
    for step in (5, 6):
        move_on(state, step)
        saving.start()
        saving.finish()
    move_on(state, 7)
    saving.start()
    with pytest.raises(RunError, match="Saves that failed in a row: 3"):
        saving.finish()
    assert find_checkpoint(tmp_path).manifest.step == 4


class Moody(Disk):
    """Refuses so many files."""

    def __init__(self, refusals) -> None:
        self.refusals = refusals

    def create(self, path):
        self.refusals -= 1
        if self.refusals >= 0:
            raise OSError(errno.EDQUOT, "refused")
        return super().create(path)


def test_the_last_save_is_tried_again(tmp_path):
    saving = saver(state_at(1), tmp_path, disk=Moody(2), max_misses=3)
    assert saving.save() == find_checkpoint(tmp_path).folder
    saving = saver(state_at(2), tmp_path, disk=Moody(3), max_misses=3)
    with pytest.raises(NotSavedError, match="Saves that failed in a row: 3"):
        saving.save()
    disk = Moody(3)
    with pytest.raises(NotSavedError):
        saver(state_at(2), tmp_path, disk=disk, max_misses=3).save(left_s=-1)
    assert disk.refusals == 2  # no time for another try


def test_a_save_under_way_that_fails_does_not_keep_the_last_from_being_tried(tmp_path):
    state = state_at(1)
    saving = saver(state, tmp_path, disk=Moody(1), max_misses=1)
    saving.start()
    move_on(state, 2)
    saving.save()
    assert (saving.saved, saving.misses) == (2, 0)


def test_what_training_waits_for_is_written_without_a_brake(tmp_path):
    saving = saver(state_at(1), tmp_path, max_mb_per_s=1e-6)  # an hour
    saving.start()
    waiting = threading.Thread(target=saving.finish, daemon=True)
    waiting.start()
    waiting.join(30)
    assert not waiting.is_alive()
    assert saving.saved == 1


def test_a_save_is_done_before_older_ones_are_looked_at(tmp_path, monkeypatch):
    may = threading.Event()
    monkeypatch.setattr(saves, "prune", lambda *_, **__: may.wait(60))
    saving = saver(state_at(1), tmp_path)
    saving.start()
    for _ in range(2):  # its file, its commit
        saving._flight.task.join(20)
        saving.move_on()
    assert (saving.saved, saving.misses, saving.under_way) == (1, 0, True)
    assert find_checkpoint(tmp_path).manifest.step == 1
    may.set()
    saving.finish()
    assert not saving.under_way


def test_steps_between_are_no_time_of_writing(tmp_path, monkeypatch):
    clock = Clock()
    for module in (saves, tasks):
        monkeypatch.setattr(module, "time", clock)
    saving = saver(state_at(1), tmp_path)
    saving.start()
    while saving.under_way:
        saving._flight.task.join()
        clock.now += 100  # a long step
        saving.move_on()
    assert (saving.saved, saving.write_s) == (1, 0.0)


def test_what_is_no_fault_of_the_disk_is_not_swallowed(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(saves, "write_file", broken)
    saving = saver(state_at(1), tmp_path)
    saving.start()
    with pytest.raises(ZeroDivisionError):
        saving.finish()


def test_only_whole_ones_count_as_kept(tmp_path):
    """A third that is damaged must not push out the second."""
    for step in (1, 2, 3):
        saver(state_at(step), tmp_path).save()
    (tmp_path / "checkpoints/step-00000003/rank-00000.safetensors").write_bytes(b"")
    saver(state_at(4), tmp_path, keep=2).save()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003", "step-00000004"]


def test_what_a_killed_run_left_is_swept(tmp_path):
    stale = tmp_path / "checkpoints" / ".writing-step-00000009-0123abcd"
    stale.mkdir(parents=True)
    (stale / "rank-00000.safetensors").write_bytes(b"half")
    saver(state_at(1), tmp_path)
    assert not stale.exists()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Saving:
    """What an `Interval` looks at."""

    def __init__(self) -> None:
        self.held_s, self.write_s, self.under_way = 0.0, 0.0, False


def saves_of(monkeypatch, *, step_s, held_s, slower_s, write_s, steps, least_s=0.0):
    """The steps at which `auto` saves, and the share of the time that it costs, on a clock of our
    own.
    """
    clock, saving = Clock(), Saving()
    monkeypatch.setattr(intervals, "time", clock)
    interval = Interval("auto", saving, least_s=least_s)
    begun, lost, left = [], 0.0, 0.0
    for step in range(1, steps + 1):
        took = step_s + (slower_s if saving.under_way else 0.0)
        clock.now += took
        lost += took - step_s
        left -= took
        if saving.under_way and left <= 0:
            saving.under_way, saving.write_s = False, write_s
        if interval.due(step, took):
            begun.append(step)
            clock.now += held_s
            lost += held_s
            saving.held_s += held_s
            saving.under_way, left = True, write_s
            interval.began()
    return begun, lost / clock.now


@pytest.mark.parametrize(
    ("held_s", "slower_s", "write_s"), [(0.5, 0.0, 3.0), (0.1, 0.05, 20.0), (10.0, 0.0, 1.0)]
)
def test_auto_costs_at_most_its_share(monkeypatch, held_s, slower_s, write_s):
    costs = {"held_s": held_s, "slower_s": slower_s, "write_s": write_s}
    begun, share = saves_of(monkeypatch, step_s=1.0, steps=3000, **costs)
    assert begun[0] == intervals.FIRST
    assert 0.02 < share <= 1.02 * intervals.SHARE  # the first came before anything was measured


def test_auto_leaves_a_disk_alone_that_costs_nothing(monkeypatch):
    costs = {"held_s": 0.0, "slower_s": 0.0, "write_s": 0.1}
    begun, _ = saves_of(monkeypatch, step_s=1.0, steps=500, least_s=60.0, **costs)
    assert {b - a for a, b in pairwise(begun[1:])} == {60}


def test_memory_that_may_be_taken(tmp_path):
    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert available_bytes(tmp_path) is None
    put("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    assert available_bytes(tmp_path) == 5000 * 1024
    put("proc/self/cgroup", "0::/job/step\n")
    put("sys/fs/cgroup/job/step/memory.max", "max\n")
    put("sys/fs/cgroup/job/step/memory.current", "3000000\n")
    assert available_bytes(tmp_path) == 5000 * 1024
    put("sys/fs/cgroup/job/step/memory.max", "4000000\n")
    put("sys/fs/cgroup/job/step/memory.stat", "anon 1\ninactive_file 500\n")
    assert available_bytes(tmp_path) == 1_000_500
    put("sys/fs/cgroup/job/memory.max", "9000000\n")  # of the job, of which this is a step
    put("sys/fs/cgroup/job/memory.current", "8500000\n")
    assert available_bytes(tmp_path) == 500_000


def test_memory_that_may_be_taken_under_the_first_cgroups(tmp_path):
    group = tmp_path / "sys/fs/cgroup/memory/slurm/job"
    group.mkdir(parents=True)
    for folder, limit, used in ((group, 2**63 - 4096, 900), (group.parent, 1000, 950)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group.parent / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 20\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:   5000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:cpu:/slurm\n2:memory:/slurm/job\n0::/\n")
    assert available_bytes(tmp_path) == 70


def test_times_as_slurm_has_them():
    from picotron_core.bounds import seconds_of

    hours = {"": 0, "90": 1.5, "90:30": 1.5 + 30 / 3600, "2:30:00": 2.5, "1-12": 36, "0-1:30": 1.5}
    for text, wanted in {**hours, "1-00:00:36": 24.01}.items():
        assert seconds_of(text) == pytest.approx(3600 * wanted), text
    for wrong in ("1:2:3:4", "-5", "1h", "1-", "٣"):
        with pytest.raises(ValueError, match="is no time"):
            seconds_of(wrong)


def test_states_of_the_random_generators_are_kept(tmp_path):
    state = state_at(1)
    torch.manual_seed(5)
    torch.rand(3)
    saver(state, tmp_path).save()
    wanted = torch.rand(4)
    torch.manual_seed(6)
    load(state, find_checkpoint(tmp_path))
    assert torch.equal(torch.rand(4), wanted)
