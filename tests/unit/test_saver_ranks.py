"""What ranks agree on when they save: either all have a checkpoint or none has."""

from __future__ import annotations

import errno
import threading
import time

from small_state import saver, state_at
from threads import PATIENCE_S, on_ranks

from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.load import find_checkpoint
from picotron_core.checkpoint.save import SLOW_DISK


def saver_of(world, comm, run, disk, **more):
    state = state_at(1, comm=comm, rank=world.rank, ranks=world.size)
    return saver(state, run, world=world, disk=disk, **more)


def begin(saving, step):
    """A step ends, and its save is begun."""
    saving.state.step = step
    assert saving.start()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Refusing(Disk):
    """Refuses to make a file while `refuses`; says when it has made one."""

    def __init__(self) -> None:
        self.refuses, self.made = False, threading.Event()

    def create(self, path):
        if self.refuses:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        descriptor = super().create(path)
        self.made.set()
        return descriptor


def test_one_rank_that_cannot_write_costs_all_that_save_alone(tmp_path, caplog):
    def work(world, comm):
        disk = Refusing()
        saving = saver_of(world, comm, tmp_path, disk)
        begin(saving, 1)
        assert saving.finish()
        disk.refuses = world.rank == 1
        begin(saving, 2)
        assert not saving.finish()
        refused = (saving.saved, saving.misses, names(tmp_path))
        world.gather("seen", "")
        disk.refuses = False
        begin(saving, 3)
        assert saving.finish()
        return refused, (saving.saved, saving.misses)

    first, third = "step-00000001", "step-00000003"
    for refused, after in on_ranks(2, work):
        assert refused[:2] == (1, 1)
        assert first in refused[2]
        assert "step-00000002" not in refused[2]
        assert after == (3, 0)
    assert names(tmp_path) == [first, third]
    assert "Disk quota exceeded on rank 1" in caplog.text
    assert find_checkpoint(tmp_path).manifest.files.keys() == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }


def test_where_one_rank_has_no_memory_for_the_copy_all_wait_and_go_on_speaking(tmp_path, caplog):
    """In the next step's collectives the others would take it for dead after run.timeout_s."""

    class Held(Disk):
        def create(self, path):
            before = comm_of[0].spoken
            until = time.monotonic() + PATIENCE_S / 2
            while comm_of[0].spoken <= before + 3 and time.monotonic() < until:
                time.sleep(0.01)
            spoken.append(comm_of[0].spoken - before)
            return super().create(path)

    comm_of, spoken = {}, []

    def work(world, comm):
        comm_of[world.rank] = comm
        world.gather("ready", "")
        saving = saver_of(world, comm, tmp_path, Held() if world.rank else Disk())
        if world.rank:
            saving._snapshot.make_room = lambda *_, **__: False
        begin(saving, 1)
        written = saving._flight.stage != "write"
        empty = saving._snapshot.buffer is None
        saving.state.step = 2
        saving.finish()
        if world.rank:
            del saving._snapshot.make_room  # now it has room
        begin(saving, 3)
        return written, empty, saving._snapshot.buffer is None, saving.saved, saving.finish()

    assert on_ranks(2, work) == [(True, True, False, 1, True)] * 2
    assert spoken[0] > 3
    assert caplog.text.count("training waits for the disk") == 1


def test_no_rank_waits_in_a_collective_for_a_disk(tmp_path):
    """Which after run.timeout_s would end the run: they speak all the while the first commits."""

    class Held(Disk):
        def rename(self, path, new):
            before = comm_of[0].spoken
            until = time.monotonic() + PATIENCE_S / 2
            while comm_of[0].spoken <= before + 3 and time.monotonic() < until:
                time.sleep(0.01)
            spoken.append(comm_of[0].spoken - before)
            super().rename(path, new)

    comm_of, spoken = [], []

    def work(world, comm):
        comm_of.append(comm)
        saving = saver_of(world, comm, tmp_path, Held())
        begin(saving, 1)
        return saving.finish()

    assert on_ranks(2, work) == [True, True]
    assert spoken[0] > 3


def test_what_a_save_may_take_counts_all_ranks_bytes(tmp_path):
    def work(world, comm):
        return saver_of(world, comm, tmp_path, Disk()).expected_s

    assert on_ranks(2, work) == [3 * 3 * 64 * 4 / SLOW_DISK] * 2


def test_damage_that_one_rank_finds_is_damage_for_all(tmp_path, caplog):
    """Each reads a part of the files for their checksums."""

    def save(world, comm):
        saving = saver_of(world, comm, tmp_path, Disk())
        for step in (1, 2):
            begin(saving, step)
            assert saving.finish()

    on_ranks(2, save)
    for number in (0, 1):
        file = tmp_path / "checkpoints" / "step-00000002" / f"rank-0000{number}.safetensors"
        right = file.read_bytes()
        file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        caplog.clear()
        found = on_ranks(2, lambda world, _: find_checkpoint(tmp_path, world).manifest.step)
        assert found == [1, 1]
        assert caplog.text.count(f"{file} is damaged: its crc32 differs. The one before") == 1
        file.write_bytes(right)
