"""The run directory's own files: names, metrics that survive a crash, and the picture."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from picotron_core.engine import run_directory
from picotron_core.engine.metrics import EvalRecord, StepRecord, bits_per_byte
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, DamagedFileError, RunError


def step(number, loss=1.0):
    return StepRecord(
        step=number,
        tokens=number,
        loss=loss,
        grad_norm=1.0,
        lr=0.1,
        tokens_per_s=1.0,
        mfu=None,
        step_s=1.0,
        peak_memory_bytes=1,
    )


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


def test_rewinding_drops_what_came_after(tmp_path):
    run = RunDirectory(tmp_path)
    for number in (1, 2, 3, 4):
        run_directory.append_metrics(run, step(number))
    evaluation = EvalRecord(step=2, tokens=2, val_loss=1.0, bits_per_byte=1.0)
    run_directory.append_metrics(run, evaluation)
    run_directory.rewind_metrics(run, 2)
    lines = list(run_directory.read_metrics(run))
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert "val_loss" in lines[-1]


@pytest.mark.parametrize("skips", [0, 1, 2])
def test_rewinding_keeps_the_skipped_updates_that_were_saved(tmp_path, skips):
    run = RunDirectory(tmp_path)
    for number, skipped in [(1, False), (1, True), (2, False), (2, True), (2, True), (3, False)]:
        run_directory.append_metrics(run, replace(step(number), skipped=skipped))
    run_directory.rewind_metrics(run, 2, skips=skips)
    lines = [(line["step"], line["skipped"]) for line in run_directory.read_metrics(run)]
    assert lines == [(1, False), (1, True), (2, False), *[(2, True)] * skips]


def test_a_last_line_cut_short_is_left_out_and_any_other_is_an_error(tmp_path):
    run = RunDirectory(tmp_path)
    run_directory.append_metrics(run, step(1))
    whole = run.metrics.read_text()
    run.metrics.write_text(whole + whole[:20])
    assert [line["step"] for line in run_directory.read_metrics(run)] == [1]
    run.metrics.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl:1 is not JSON"):
        list(run_directory.read_metrics(run))


def test_bits_per_byte():
    # One bit per token of two bytes is half a bit per byte.
    assert bits_per_byte(0.6931471805599453, 2.0) == pytest.approx(0.5)


def test_the_picture_holds_both_curves(tmp_path):
    lines = [json.loads(json.dumps(run_directory.as_line(step(n, 5 / n)))) for n in range(1, 30)]
    lines.append({"step": 29, "val_loss": 1.5})
    assert plot_losses(lines, tmp_path / "loss.png", title="run")
    with Image.open(tmp_path / "loss.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
    assert {(0x08, 0x51, 0x9C), (0xD9, 0x48, 0x01)} <= colours


def test_what_a_checkpoint_needs_survives_a_power_cut(tmp_path, monkeypatch):
    """Names are durable once their folder is: from the tokenizer's files up to the run's own."""
    run = run_directory.create(tmp_path / "runs", "demo")
    run.tokenizer.mkdir()
    (run.tokenizer / "tokenizer.json").write_text("{}")
    synced = []
    monkeypatch.setattr(run_directory, "fsync", synced.append)
    run_directory.make_durable(run)
    parts = [run.tokenizer / "tokenizer.json", run.tokenizer, run.path, tmp_path / "runs"]
    assert synced == parts
