"""The run directory's own files and names."""

import pytest

from picotron_core.engine import run_directory
from picotron_core.engine.metrics import bits_per_byte
from picotron_core.errors import ConfigError, RunError


def test_a_new_folder_each_time(tmp_path):
    names = [run_directory.create(tmp_path / "runs", "a").path.name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]
    assert run_directory.create(tmp_path / "runs", "").path.name[:2] == "20"


@pytest.mark.parametrize("name", ["a/b", "../a", "/a", ".."])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(ConfigError, match="plain folder name"):
        run_directory.create(tmp_path, name)


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError):
        run_directory.create(tmp_path / "runs", "a")


def test_bits_per_byte():
    # One bit per token of two bytes is half a bit per byte.
    assert bits_per_byte(0.6931471805599453, 2.0) == pytest.approx(0.5)


def test_what_a_checkpoint_needs_survives_a_power_cut(tmp_path, monkeypatch):
    """Names are durable once their folder is; each file is on the disk before it has its name."""
    run = run_directory.create(tmp_path / "runs", "demo")
    synced = []
    monkeypatch.setattr(run_directory, "fsync", synced.append)
    run_directory.make_durable(run)
    parts = [run.tokenizer, run.model, run.path, tmp_path / "runs"]
    assert synced == parts
