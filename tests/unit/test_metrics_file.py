"""metrics.jsonl: read in bounded memory, cut in its place, and damaged in many ways."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from picotron_core import cli
from picotron_core.engine.metrics import EvalRecord, StepRecord
from picotron_core.engine.metrics_file import BLOCK, append_metrics, as_line, read_metrics
from picotron_core.engine.metrics_scan import Curve, read_curve, rewind_metrics, scan
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import DamagedFileError


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


def evaluation(number):
    return EvalRecord(step=number, tokens=number, val_loss=1.0, bits_per_byte=1.0)


@pytest.fixture
def run(tmp_path):
    """Steps 1 to 4, with an evaluation after the second."""
    run = RunDirectory(tmp_path)
    for record in (step(1), step(2), evaluation(2), step(3), step(4)):
        append_metrics(run, record)
    return run


def steps_of(run):
    return [line["step"] for line in read_metrics(run)]


def test_rewinding_drops_what_came_after(run):
    rewind_metrics(run, 2)
    lines = list(read_metrics(run))
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert "val_loss" in lines[-1]


@pytest.mark.parametrize("skips", [0, 1, 2])
def test_rewinding_keeps_the_skipped_updates_that_were_saved(tmp_path, skips):
    run = RunDirectory(tmp_path)
    for number, skipped in [(1, False), (1, True), (2, False), (2, True), (2, True), (3, False)]:
        append_metrics(run, replace(step(number), skipped=skipped))
    rewind_metrics(run, 2, skips=skips)
    lines = [(line["step"], line["skipped"]) for line in read_metrics(run)]
    assert lines == [(1, False), (1, True), (2, False), *[(2, True)] * skips]


def test_a_file_with_nothing_to_drop_is_not_written(run):
    run.metrics.chmod(0o600)
    before = run.metrics.stat()
    rewind_metrics(run, 4)
    after = run.metrics.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_stays_is_not_written_again(run):
    """The file is cut in its place: a crash in the middle leaves the old lines or fewer of them."""
    before = run.metrics.read_bytes()
    number = run.metrics.stat().st_ino
    rewind_metrics(run, 3)
    assert run.metrics.stat().st_ino == number
    assert before.startswith(run.metrics.read_bytes())
    assert steps_of(run) == [1, 2, 2, 3]


TAILS = {
    "half a line": b'{"step": 5, "tok',
    "half a line, ended": b'{"step": 5, "tok\n',
    "half a line of foreign bytes": b'{"step": 5, "lo\xff\xfe',
    "foreign bytes as a line": b"\xff\xfe\n",
    "NUL bytes": bytes(5000),
    "half a line, then NUL bytes": b'{"step": 5, "tok' + bytes(3 * BLOCK),
    "an empty line": b"\n",
    "empty lines": b"\r\n\n  \n",
    "a line that lacks its beginning": bytes(7) + b'"skipped": false}\n',
}


@pytest.mark.parametrize("tail", TAILS)
def test_an_end_that_a_crash_left_is_dropped(run, tail):
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + TAILS[tail])
    assert steps_of(run) == [1, 2, 2, 3, 4]
    assert len(read_curve(run).steps) == 4
    rewind_metrics(run, 4)
    assert run.metrics.read_bytes() == whole
    append_metrics(run, step(5))
    assert steps_of(run)[-1] == 5


def test_a_last_line_without_its_end_is_ended(run):
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole[:-1])
    rewind_metrics(run, 4)
    assert run.metrics.read_bytes() == whole


def test_what_another_editor_left_is_read(run):
    text = run.metrics.read_bytes().replace(b"\n", b"\r\n").replace(b'": ', b'":')
    run.metrics.write_bytes(b"\xef\xbb\xbf" + text)
    assert steps_of(run) == [1, 2, 2, 3, 4]
    assert list(read_curve(run).steps) == [1, 2, 3, 4]


DAMAGES = {  # the second line's new content, and what is said of it
    "foreign bytes": (b"\xff\xfe\xfd", "is not JSON"),
    "words": (b"hello", "is not JSON"),
    "half a line": (b'{"step": 2, "tok', "is not JSON"),
    "two records": (b'{"step": 2}{"step": 2}', "is not JSON"),
    "a number": (b"5", "is not a JSON object"),
    "a list": (b'[{"step": 2}]', "is not a JSON object"),
    "a text": (b'"step"', "is not a JSON object"),
    "null": (b"null", "is not a JSON object"),
    "NaN": (b"NaN", "is not a JSON object"),
    "no keys": (b"{}", "has no step"),
    "no step": (b'{"loss": 2.0, "skipped": false}', "has no step"),
    "a step that is text": (b'{"step": "2", "loss": 2.0}', "has no step"),
    "a step that is true": (b'{"step": true, "loss": 2.0}', "has no step"),
    "a step that is a fraction": (b'{"step": 2.5, "loss": 2.0}', "has no step"),
    "a step like 2.0": (b'{"step": 2.0, "loss": 2.0}', "has no step"),
    "a step below zero": (b'{"step": -2, "loss": 2.0}', "has no step"),
    "a huge step": (b'{"step": 99999999999999999999, "loss": 2.0}', "has no step"),
    "a step of 5000 digits": (b'{"step": ' + b"9" * 5000 + b', "loss": 2.0}', "is not JSON"),
    "a step that is NaN": (b'{"step": NaN, "loss": 2.0}', "has no step"),
    "a step that is null": (b'{"step": null, "loss": 2.0}', "has no step"),
    "a loss that is text": (b'{"step": 2, "loss": "2.0", "skipped": false}', "has a loss"),
    "a loss that is a list": (b'{"step": 2, "loss": [], "skipped": false}', "has a loss"),
    "a loss that is false": (b'{"step": 2, "loss": false, "skipped": false}', "has a loss"),
    "a huge loss": (b'{"step": 2, "loss": 1' + b"0" * 400 + b"}", "has a loss"),
    "skipped as text": (b'{"step": 2, "loss": 2.0, "skipped": "no"}', "skipped"),
    "steps that go back": (b'{"step": 0, "loss": 2.0}', "is of step 0, but follows step 1"),
    "deep brackets": (b"[" * 16000, "is not JSON"),
    "a line of 3 MB": (b"x" * (3 << 20), "is longer than"),
    "NUL bytes": (bytes(300), "is not JSON"),
    "UTF-16": ('{"step": 2}'.encode("utf-16"), "is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_line_that_no_run_wrote_is_named(run, damage):
    content, wanted = DAMAGES[damage]
    lines = run.metrics.read_bytes().splitlines()
    run.metrics.write_bytes(b"\n".join([lines[0], content, *lines[2:], b""]))
    before = run.metrics.read_bytes()
    for use in (lambda: list(read_metrics(run)), lambda: read_curve(run), lambda: rewind(run)):
        with pytest.raises(DamagedFileError, match=rf"metrics\.jsonl:2 .*{wanted}"):
            use()
    assert run.metrics.read_bytes() == before


def rewind(run):
    rewind_metrics(run, 2)


def test_the_line_is_named_far_into_a_file(run):
    whole = run.metrics.read_bytes().splitlines(keepends=True)
    many = whole[:1] * 20_000
    assert sum(map(len, many)) > 2 * BLOCK
    run.metrics.write_bytes(b"".join([*many, b"5\n", *many]))
    with pytest.raises(DamagedFileError, match=":20001 is not a JSON object"):
        read_curve(run)
    run.metrics.write_bytes(b"".join([*many, b"5" * BLOCK, *many]))
    with pytest.raises(DamagedFileError, match=":20001 is longer"):
        read_curve(run)
    run.metrics.write_bytes(b"".join([*whole[3:4] * 20_000, *many]))
    with pytest.raises(DamagedFileError, match=":20001 is of step 1, but follows step 3"):
        rewind_metrics(run, 4)


def test_a_missing_or_an_empty_file_has_no_lines(run, caplog):
    run.metrics.write_bytes(b"")
    rewind_metrics(run, 3)
    assert "ends with step 0: what was measured until step 3 is lost" in caplog.text
    run.metrics.unlink()
    rewind_metrics(run, 3)
    assert not run.metrics.exists()
    assert steps_of(run) == []
    assert len(read_curve(run).steps) == 0


def random_lines(count):
    """As runs write them, and a few otherwise."""
    draw = random.Random(0)
    for number in range(1, count + 1):
        loss = draw.choice([draw.random() * 10, draw.random() * 1e-5, 3, 0.0, 1e22, None])
        record = as_line(replace(step(number, loss), skipped=draw.random() < 0.02))
        if draw.random() < 0.05:
            record = as_line(evaluation(number)) | {"val_loss": draw.random()}
        if draw.random() < 0.05:
            record = dict(reversed(record.items()))
        yield json.dumps(record, separators=draw.choice([(", ", ": "), (",", ":")]))


def test_arrays_hold_what_json_does(run):
    run.metrics.write_text("\n".join(random_lines(6000)) + "\n")
    lines = list(read_metrics(run))
    keys = ("loss", "val_loss", "mfu", "tokens", "peak_memory_bytes")
    parts = list(scan(run.metrics, keys))
    assert np.concatenate([part.step for part in parts]).tolist() == [n["step"] for n in lines]
    skipped = [line.get("skipped", False) for line in lines]
    assert np.concatenate([part.skipped for part in parts]).tolist() == skipped
    for key in keys:
        found = np.concatenate([part.values[key] for part in parts])
        wanted = [math.nan if line.get(key) is None else line[key] for line in lines]
        np.testing.assert_array_max_ulp(found, np.array(wanted, float), 1)
    assert sum(line.get("loss") is not None and not line["skipped"] for line in lines) == len(
        read_curve(run).steps
    )


MEASURE = """
import sys
from pathlib import Path
from picotron_core.engine.metrics_scan import read_curve, rewind_metrics
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
curve = read_curve(run)
assert plot_losses({"a": curve}, run.plot, title="a")
rewind_metrics(run, int(curve.steps[-1]) - 1)
assert "torch" not in sys.modules
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(curve.steps), int(peak.split()[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_long_run_is_read_drawn_and_rewound_in_little_memory(run):
    """200 000 lines of 220 bytes; `benchmarks/bench_metrics.py` does it with a million."""
    with run.metrics.open("w") as file:
        for number in range(1, 200_001):
            file.write(LINE.format(step=number, loss=2 + 1 / number))
    command = [sys.executable, "-c", MEASURE, str(run.path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    steps, peak_mb = map(int, out.split())
    assert steps == 200_000
    assert peak_mb < 200


LINE = (
    '{{"step": {step}, "tokens": 256, "loss": {loss}, "grad_norm": 0.5, "lr": 0.001, '
    '"tokens_per_s": 1234.5, "mfu": 0.25, "step_s": 0.5, "peak_memory_bytes": 123456789, '
    '"loss_scale": null, "skipped": false}}\n'
)


def curve_of(count):
    numbers = np.arange(1, count + 1)
    return Curve(numbers, 5 / numbers, numbers[-1:], np.array([1.5]))


def colours_of(path):
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1_000_000)}


@pytest.mark.parametrize("count", [1, 29, 50_000])
def test_the_picture_holds_both_curves(tmp_path, count):
    path = tmp_path / "loss.png"
    assert plot_losses({"run": curve_of(count)}, path, title="run")
    assert (0xD9, 0x48, 0x01) in colours_of(path)
    assert count == 1 or (0x08, 0x51, 0x9C) in colours_of(path)


def test_losses_that_no_picture_can_hold_are_not_drawn(run):
    text = run.metrics.read_text()
    more = "".join(f'{{"step": {n}, "loss": {loss}}}\n' for n, loss in ((5, 1e308), (6, -1e308)))
    run.metrics.write_text(text + more)
    curve = read_curve(run)
    assert list(curve.steps) == [1, 2, 3, 4]
    largest = Curve(np.arange(2), np.array([3e38, -3e38]), *(np.empty(0),) * 2)
    assert plot_losses({"run": curve, "largest": largest}, run.path / "loss.png", title="run")


def test_a_spike_of_one_step_among_many_is_seen(tmp_path):
    losses = np.ones(50_000)
    plain, spiked = tmp_path / "plain.png", tmp_path / "spiked.png"
    none = np.empty(0)
    for path in (plain, spiked):
        curve = Curve(np.arange(50_000), losses, none, none)
        plot_losses({"run": curve}, path, title="run")
        losses[31_415] = 100.0
    assert plain.read_bytes() != spiked.read_bytes()


@pytest.mark.parametrize("name", ["$x_", "a $\\frac$ b", "$$", "_hidden", "tab\there", "\udcff"])
def test_any_name_can_be_drawn(tmp_path, name):
    plot_losses({name: curve_of(9), "other": curve_of(9)}, tmp_path / "a.png", title=name)
    plot_losses({name: curve_of(9)}, tmp_path / "b.png", title=name)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    words = ["train", *tiny, "--name", "a", "--train.steps", "4", "--checkpoint.every", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["picotron", *words])
        patch.chdir(folder)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return folder / "runs" / "a"


PLACES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a file of ours": lambda path: path.symlink_to("config.toml"),
    "a foreign line": lambda path: path.write_bytes(b'{"step": 1}\n\xe4\n{"step": 2}\n'),
    "another JSON": lambda path: path.write_text('[\n{"step": 1}\n]\n'),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_with_such_a_file_is_not_resumed_but_used(trained, tmp_path, place, monkeypatch):
    run = tmp_path / "moved"
    shutil.copytree(trained, run)
    metrics = run / "metrics.jsonl"
    metrics.unlink()
    PLACES[place](metrics)
    before = metrics.lstat()

    err = tmp_path / "err"
    monkeypatch.chdir(tmp_path)

    def main():
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        cli.main()

    def picotron(*words):
        """In a child, which may hang."""
        monkeypatch.setattr("sys.argv", ["picotron", *words])
        err.write_text("")
        child = forked.fork(main, tmp_path / "out", err, os.environ.copy())
        return forked.wait(child, time.monotonic() + 300)

    assert picotron("train", "--resume", "moved", "--train.steps", "6") == 1
    said = err.read_text()
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "metrics.jsonl" in said
    assert "move the file away" in said or "move it away" in said
    after = metrics.lstat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if place == "a pipe":
        assert picotron("generate", "moved", "--max-new-tokens", "2") == 0
        assert picotron("export", "moved", "exported") == 0
