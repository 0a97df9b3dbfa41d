"""A checkpoint is whole or it does not exist; what is not whole is named."""

import json
import os
import shutil
import subprocess
import sys
from io import FileIO

import pytest
import small_state
import torch
from power import Recorder
from small_state import FACTS, save_at, saver, state_at

from picotron_core.checkpoint import manifest as manifests
from picotron_core.checkpoint.disk import Disk
from picotron_core.checkpoint.load import find_checkpoint, load, open_checkpoint
from picotron_core.checkpoint.manifest import MANIFEST, read_manifest
from picotron_core.errors import ConfigError, DamagedFileError, RunError

TENSORS = "rank-00000.safetensors"
SUPPORT = os.path.dirname(small_state.__file__)


def test_what_was_saved_is_read_back(tmp_path):
    save_at(3, tmp_path)
    state = state_at(0)
    checkpoint = find_checkpoint(tmp_path)
    load(state, checkpoint)
    assert (state.step, state.tokens, checkpoint.manifest.facts) == (3, 30, FACTS)
    assert checkpoint.manifest.samples == 12
    assert torch.equal(state.masters["weight"], torch.full((3, 64), 3.0))
    assert torch.equal(state.moments["exp_avg"]["weight"], torch.full((3, 64), 3.25))
    assert torch.equal(state.moments["exp_avg_sq"]["weight"], torch.full((3, 64), 3.5))


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_at(step, tmp_path, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((TENSORS, damage) for damage in ("flip", "cut", "missing", "link", "pipe")),
        *((MANIFEST, damage) for damage in ("flip", "cut", "missing")),
    ],
)
def test_any_damage_is_named_and_the_one_before_is_used(tmp_path, name, damage, caplog):
    save_at(1, tmp_path)
    file = save_at(2, tmp_path) / name
    content = file.read_bytes()
    if damage == "flip":
        where = content.index(b'"files"') + 1 if name == MANIFEST else len(content) - 3
        file.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        file.unlink()
    elif damage == "pipe":  # which no one writes to: opening it must not wait
        file.unlink()
        os.mkfifo(file)
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    found = find_checkpoint(tmp_path)
    assert found.manifest.step == 1
    assert found.folder.name == "step-00000001"
    assert name in caplog.text
    with pytest.raises(DamagedFileError, match=name):
        open_checkpoint(file.parent)


def test_every_byte_of_the_manifest_counts(tmp_path):
    """No flip goes unnoticed, not even in the spaces between, or of 1e-05 to 1E-05."""
    saving = saver(state_at(1), tmp_path)
    saving.facts = FACTS.model_copy(update={"config": {"lr": 1e-05}})
    folder = saving.save()
    path = folder / MANIFEST
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        with pytest.raises(DamagedFileError, match=MANIFEST):
            read_manifest(folder)
    for other in (
        content.replace(b" ", b"\t", 1),
        content + b"\n",
        content.replace(b"1e-05", b"1E-05"),
    ):
        assert json.loads(other) == json.loads(content)
        path.write_bytes(other)
        with pytest.raises(DamagedFileError, match="not as it was written"):
            read_manifest(folder)
    manifest = json.loads(content)
    manifest["manifest"]["step"] = 7
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedFileError, match="its crc32 differs"):
        open_checkpoint(folder)


def test_a_manifest_that_comes_in_parts_is_read_whole(tmp_path, monkeypatch):
    class Slow(FileIO):
        """A network disk may bring less than it was asked for."""

        def read(self, size=-1):
            return super().read(min(size, 100))

        def readinto(self, target):
            return super().readinto(memoryview(target)[:100])

    folder = save_at(1, tmp_path)
    monkeypatch.setattr(manifests, "open_regular", lambda path: Slow(path))
    assert read_manifest(folder).step == 1


def test_pruning_spares_what_was_just_written(tmp_path):
    """Damaged or abandoned later steps must not count as the newest."""
    for step in (1, 2, 100):
        save_at(step, tmp_path)
    (tmp_path / "checkpoints" / "step-00000100" / MANIFEST).write_text("{}")
    saved = save_at(50, tmp_path, keep=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000050"]
    assert saved.name == "step-00000050"


def test_what_is_the_users_is_neither_taken_nor_removed(tmp_path, caplog):
    caplog.set_level("INFO")
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 99_999_999, 100_000_000):
        folder = save_at(step, tmp_path)
    (folder / MANIFEST).write_text("{}")
    mine = [checkpoints / name for name in ("step-00000001.mine", "step-best", "step-7")]
    for path in mine:
        shutil.copytree(checkpoints / "step-00000001", path)
    link = checkpoints / "step-00000000"
    link.symlink_to(mine[0])
    assert find_checkpoint(tmp_path).manifest.step == 99_999_999
    caplog.clear()
    newest = save_at(100_000_001, tmp_path, keep=1)
    assert set(checkpoints.iterdir()) == {newest, link, *mine}
    assert (
        "removed step-100000000, step-99999999, step-00000001: 1 newer ones are kept" in caplog.text
    )
    assert find_checkpoint(mine[1]).manifest.step == 1  # named, it is taken


def test_a_checkpoint_under_another_steps_name_is_none(tmp_path, caplog):
    other = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(save_at(2, tmp_path), other)
    found = find_checkpoint(tmp_path)
    assert (found.folder.name, found.manifest.step) == ("step-00000002", 2)
    assert "step-00000003/manifest.json is of step 2: the folder was renamed" in caplog.text
    save_at(4, tmp_path, keep=2)  # and it does not count as one that is kept
    assert find_checkpoint(tmp_path, below=4).manifest.step == 2


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(tmp_path, caplog):
    class Killed(Recorder):
        def remove(self, folder):
            if folder.exists():
                assert self.log[-1][:2] == ("fsync", folder.parent)  # it has lost its name for sure
                (folder / TENSORS).unlink()
                raise OSError("killed")

    save_at(1, tmp_path)
    save_at(2, tmp_path, keep=1, disk=Killed())
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000002", ".writing-step-00000001-old"}
    assert "older checkpoints are left: killed" in caplog.text
    save_at(3, tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_what_cannot_be_removed_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda folder, ignore_errors: None)
    Disk().remove(tmp_path)
    assert f"{tmp_path} could not be removed" in caplog.text


def test_the_same_step_is_replaced(tmp_path):
    save_at(3, tmp_path)
    state = state_at(3)
    state.masters["weight"].data.fill_(42)
    saver(state, tmp_path, keep=1).save()
    found = state_at(0)
    load(found, find_checkpoint(tmp_path))
    assert found.masters["weight"].unique().tolist() == [42]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (save_at(1, tmp_path) / MANIFEST).unlink()
    with pytest.raises(DamagedFileError, match=r"No checkpoint of .* is whole"):
        find_checkpoint(tmp_path)


def test_another_model_is_named(tmp_path):
    save_at(1, tmp_path)
    with pytest.raises(DamagedFileError, match=r"weight is \(3, 64\) there, \(3, 32\) here"):
        load(state_at(0, size=32), find_checkpoint(tmp_path))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from picotron_core.errors import RunError
from small_state import saver, state_at
run = Path({run!r})
saver(state_at(1), run).save()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    saver(state_at(2), run, max_misses=1).save()
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 100, 700])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, limit):
    """The kernel refuses to let a file grow: in the first file, and in the manifest."""
    script = FULL_DISK.format(tests=SUPPORT, run=str(tmp_path), limit=limit)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "Cannot write the checkpoint" in result.stdout, result
    assert "step-00000002" in result.stdout
    assert find_checkpoint(tmp_path).folder.name == "step-00000001"
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()
    save_at(3, tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000001", "step-00000003"]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from small_state import saver, state_at
for step in range(1, 1000):
    print(step, flush=True)
    saver(state_at(step, size=20000), Path({run!r}), keep=2).save()
"""


@pytest.mark.parametrize("last_line", ["3", "4", "6"])
def test_killed_in_mid_save_it_resumes_from_a_whole_one(tmp_path, last_line):
    """SIGKILL as the child begins a save; whatever it left, the newest whole one is found."""
    script = KILLED.format(tests=SUPPORT, run=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == last_line:
            process.kill()
            break
    process.communicate()
    found = find_checkpoint(tmp_path)
    assert found.manifest.step >= int(last_line) - 1
    state = state_at(0, size=20000)
    load(state, found)
    assert state.masters["weight"].unique().tolist() == [float(found.manifest.step)]


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match="Cannot write the checkpoint"):
        save_at(1, tmp_path)
