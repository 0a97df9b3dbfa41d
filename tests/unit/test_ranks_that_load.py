"""What several ranks load: one checkpoint, which every one of them can read."""

from __future__ import annotations

import json
from dataclasses import dataclass

import forge
import pytest
from small_state import save_at, state_at

from picotron_core.checkpoint import load as loads
from picotron_core.checkpoint.load import find_checkpoint, load_newest
from picotron_core.cli.job import _of_the_first
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import DamagedFileError
from picotron_core.parallel.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Two(World):
    """Rank 0, and a second one that answers as it is told: {start of a key: answer}."""

    answers: dict[str, str]

    def gather(self, key, value):
        found = (text for start, text in self.answers.items() if key.startswith(start))
        return [value, next(found, value)]


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        save_at(step, tmp_path)
    return tmp_path


def test_a_manifest_that_ranks_see_differently_is_damage(run, caplog):
    world = Two(answers={"damage/None/step-00000002": "\n12345"})
    assert find_checkpoint(run, world).manifest.step == 1
    assert "step-00000002/manifest.json is not the same for all ranks" in caplog.text


def test_what_another_rank_cannot_read_is_loaded_by_none(run, caplog):
    state, world = state_at(0), Two(answers={"load/2": "rank-00000.safetensors cannot be read"})
    loaded = load_newest(state, run, find_checkpoint(run, world), world)
    assert loaded.manifest.step == state.step == 1
    assert state.masters["weight"].unique().tolist() == [1]
    assert "cannot be read The one before" in caplog.text


def test_what_cannot_be_read_any_more_once_it_was_checked(run, monkeypatch):
    """A disk that fails in between: the file is named, and the checkpoint before is taken."""
    found, state, opened = find_checkpoint(run), state_at(0), loads.open_regular

    def failing(path):
        if path.parent.name == "step-00000002":
            raise OSError(5, "Input/output error", str(path))
        return opened(path)

    monkeypatch.setattr(loads, "open_regular", failing)
    file = run / "checkpoints" / "step-00000002" / forge.FILE
    with pytest.raises(DamagedFileError, match=rf"{file} cannot be read \(Input/output error\)"):
        loads.load(state_at(0), found)
    with pytest.raises(DamagedFileError, match="Input/output error"):
        load_newest(state_at(0), found.folder, found, World())  # that one was asked for
    assert load_newest(state, run, found, World()).manifest.step == state.step == 1
    assert state.moments["exp_avg"]["weight"].unique().tolist() == [1.25]


def test_the_run_is_the_one_that_the_first_rank_found(tmp_path):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Second(World):
        def share(self, key, make):
            return json.dumps([str(tmp_path / "first"), str(tmp_path / "first")])

    other = tmp_path / "other"
    run, wanted = _of_the_first((RunDirectory(other), other), Second(rank=1, size=2))
    assert run.path == wanted == tmp_path / "first"
