"""Whenever the power goes, or the disk refuses, a complete checkpoint is there and is found."""

from __future__ import annotations

import errno
import random
import shutil
from itertools import count
from pathlib import Path

import pytest
from power import Model, Recorder
from small_state import save_at, saver, state_at

from picotron_core.checkpoint import write
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.load import find_checkpoint, load, open_checkpoint
from picotron_core.errors import PicotronError

CHANCES = 4


def content(run: Path) -> float:
    """The step that every number of the newest checkpoint tells of."""
    checkpoint = find_checkpoint(run)
    state = state_at(0)
    load(state, checkpoint)
    (value,) = state.masters["weight"].unique().tolist()
    assert value == checkpoint.manifest.step
    assert state.moments["exp_avg"]["weight"].unique().tolist() == [value + 0.25]
    return value


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The operations of five saves, and after which of them each save was told to be done."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    run.mkdir()
    disk, done = Recorder(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "CHUNK", 100)  # several writes a file
        for step in (1, 2, 3, 3, 4):  # one again: by a run that went on from an earlier one
            saver(state_at(step), run, keep=2, disk=disk).save()
            done.append((len(disk.log), step))
    return run, disk.log, done


def cuts(run, log, target):
    """(operations done, the folder of the run as a power cut then may leave it)."""
    for cut in range(len(log) + 1):
        model = Model(run)
        for operation in log[:cut]:
            model.do(operation)
        for number in range(CHANCES):
            left = target / "left"
            model.after_a_cut(left, random.Random(f"{cut} {number}") if number else None)
            yield cut, left
            shutil.rmtree(left)


def test_after_a_power_cut_at_any_moment_a_complete_checkpoint_loads(recorded, tmp_path):
    run, log, done = recorded
    assert len(log) > 80
    loaded = set()
    for cut, left in cuts(run, log, tmp_path):
        told = max((step for end, step in done if end <= cut), default=0)
        if not told and not list(left.glob("checkpoints/step-*")):
            continue
        if told:
            for folder in left.glob("checkpoints/step-*"):
                open_checkpoint(folder)  # what has the name is whole
        found = content(left)
        loaded.add(found)
        # While step 3 is replaced there is none of that step, but the one before.
        assert found >= (told if told != 3 else 2), cut
    assert loaded == {1, 2, 3, 4}


@pytest.mark.parametrize("trusted", [".safetensors", ".json", ""])
def test_the_model_tells_a_save_that_trusts_the_page_cache(recorded, tmp_path, trusted):
    """Without the fsync of tensors, of manifests or of folders, what was told is lost."""
    run, log, _ = recorded
    model = Model(run)
    for operation in log:
        if operation[0] != "fsync" or operation[1].suffix != trusted:
            model.do(operation)
    model.after_a_cut(tmp_path / "left")
    with pytest.raises((PicotronError, FileNotFoundError)):
        content(tmp_path / "left")


def test_a_disk_that_refuses_anything_anywhere_costs_that_save_alone(tmp_path):
    """Each call of a save fails once; training goes on, and a restart leaves nothing behind."""

    class Refusing(Disk):
        def __init__(self, number):
            self.left = number

        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            if name not in {"make_folder", "create", "write", "fsync", "fsync_folder", "rename"}:
                return found
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return found

    for number in count(1):
        run = tmp_path / str(number)
        save_at(1, run)
        state = state_at(2)
        saving = saver(state, run, disk=Refusing(number))
        saving.start()
        refused = not saving.finish()
        assert content(run) in ((1.0, 2.0) if refused else (2.0,))
        if not refused:
            break
        state.step = 3
        state.masters["weight"].data.fill_(3)
        state.moments["exp_avg"]["weight"].fill_(3.25)
        saving.save()  # the next interval
        assert content(run) == 3
        saver(state, run)  # a restart
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert {"step-00000001", "step-00000003"} <= names
        assert all(name.startswith("step-") for name in names)
    assert number > 10


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with two checkpoints of 72 KB."""
    run = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        saver(state_at(step, size=2000), run).save()
    return run


def seen(run, file, text, caplog):
    """Write `text` in place of a file: the checkpoint before must be taken, and the file named."""
    caplog.clear()
    right = file.read_bytes()
    file.write_bytes(text)
    assert find_checkpoint(run).manifest.step == 1
    assert str(file) in caplog.text
    file.write_bytes(right)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_truncation_is_seen_wherever_it_is(two, name, caplog):
    file = two / "checkpoints" / "step-00000002" / name
    content = file.read_bytes()
    lengths = [*range(0, len(content), 4096), len(content) - 1]
    for length in lengths:
        seen(two, file, content[:length], caplog)
    seen(two, file, content + b"\0", caplog) if name != "manifest.json" else None


def test_a_thousand_flipped_bits_are_all_seen(two, caplog):
    folder = two / "checkpoints" / "step-00000002"
    chance = random.Random(0)
    for number in range(1000):
        file = folder / ("rank-00000.safetensors" if number % 4 else "manifest.json")
        content = bytearray(file.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        seen(two, file, bytes(content), caplog)
