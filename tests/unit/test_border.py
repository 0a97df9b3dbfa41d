"""Whatever a user writes on a command line ends in a result or in one line, never in a crash."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

HUGE = ["9223372036854775808", "1" + "0" * 30]
COMMANDS = {
    "generate": (),
    "export": ("new",),
    "checkpoint list": (),
    "checkpoint verify": (),
    "checkpoint inspect": (),
    "checkpoint prune": (),
    "trace": (),
    "slurm status": (),
    "conformance": (),
    "conformance verify": (),
    "train --resume": (),
    "train --data": (),
    "train --model.path": (),
    "train": (),
    "doctor": (),
    "backends": (),
    "config": (),
    "quarantine clear": (),
}
NAMES = {
    "empty": "",
    "long": "x" * 300,
    "a long path": "y/" * 3000,
    "a device": "/dev/null",
    "of another": "/proc/1/root",
    "not UTF-8": "caf\udce9",
    "escapes": "\x1b[2J",
    "lines": "a\nb",
    "no home": "~nobody-of-that-name/x",
    "markup": "[red]x[/]",
    "format": "{0} %s %n",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_nothing_is_one_line(picotron, command, name):
    if name == "empty" and command in ("train --model.path", "quarantine clear"):
        return  # the defaults: the model of the settings, all trials
    code, out, err = picotron(*command.split(), NAMES[name], *COMMANDS[command])
    assert_refused(code, out, err)


def assert_refused(code: int, out: str, err: str) -> None:
    assert code in (1, 2), (out, err)
    assert "Traceback" not in out + err
    assert "it is a bug" not in err
    said = err.splitlines()
    mistakes = [line for line in said if line.startswith(("error: ", "Error: "))]
    assert len(mistakes) == 1, err
    if mistakes[0].startswith("error: "):
        assert said == mistakes
    assert all(line.isprintable() for line in said)
    assert len(mistakes[0]) < 2000 or "y/" in err


OPTIONS = [
    *(("train", "--nproc", n) for n in ["0", "-1", "x", "1.5", "1000", "1000000", *HUGE]),
    *(("verify-resume", "--nproc", n) for n in ["0", "1000000", *HUGE]),
    *(("verify-resume", "--then-nproc", n) for n in ["-1", "1000000", *HUGE]),
    *(("verify-resume", "--steps", n) for n in ["1", "nan", *HUGE]),
    *(("compare", "dp-zero", "--nproc", n) for n in ["-1", "1000000", *HUGE]),
    *(("compare", "dp-zero", "--steps", n) for n in ["0", *HUGE]),
    *(("plan", "--nproc", n) for n in ["-1", "1000000000", *HUGE]),
    *(("export", "run", "new", "--shard-mb", n) for n in ["0", "-1", "inf", "1e300", "x"]),
    *(("checkpoint", "prune", "run", "--keep", n) for n in ["0", "-1", *HUGE]),
    ("generate", "run", "--seed", "x"),
    ("generate", "run", "--max-new-tokens", "1.5"),
    *(("plot", "run", "--output", path) for path in ["", ".", "x/", "x.svg", "metrics.jsonl"]),
    ("train", "--nproc"),
    ("train", "--train.steps"),
    ("train", "--", "--train.steps"),
    ("train", "a.toml", "b.toml"),
    ("train", "--=", "3"),
    ("train", "--.", "3"),
    ("train", "---train.steps", "3"),
    ("train", "--train", "3"),
    ("train", "--train.steps.x", "3"),
    ("train", "--TRAIN.STEPS", "3"),
    ("nothing",),
    ("train", "--train.steps=1e3"),
]


@pytest.mark.parametrize("words", OPTIONS, ids=lambda words: " ".join(words)[:50])
def test_an_option_that_makes_no_sense_starts_nothing(picotron, words):
    assert_refused(*picotron(*words))


COMBINATIONS = {
    "heads that do not divide": ("--model.num_attention_heads", "7"),
    "key heads that do not divide": ("--model.num_key_value_heads", "3"),
    "an odd head": ("--model.head_dim", "7"),
    "more heads than width": ("--model.hidden_size", "4", "--model.num_attention_heads", "8"),
    "more tokens than positions": ("--data.seq_len", "4096"),
    "frequencies upside down": (
        *("--model.rope_scaling.low_freq_factor", "4"),
        *("--model.rope_scaling.high_freq_factor", "4"),
    ),
    "more stages than layers": ("--parallel.pp", "7"),
    "slices that do not divide": ("--parallel.tp", "3"),
    "contexts that do not divide": ("--parallel.cp", "3"),
    "more memory than there is": (
        *("--model.num_hidden_layers", "2048", "--model.hidden_size", "131072"),
        *("--model.intermediate_size", "4194304"),
    ),
    "a batch of all": ("--train.micro_batch", "65536", "--data.seq_len", "2048"),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_settings_that_contradict_each_other_are_told_before_anything_is_read(
    picotron, combination, tmp_path
):
    assert_refused(*picotron("train", *COMBINATIONS[combination], "--data", "nowhere"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def strange(tmp_path: Path) -> str:
    """A folder whose name is not UTF-8, to work in, with such a folder of text in it."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder + b"/t\xe9xt")
    words = random.Random(0).choices(["lazy", "dogs", "jump", "over", "quick", "foxes"], k=4000)
    with open(folder + b"/t\xe9xt/d\xe9.txt", "w") as file:
        file.write(" ".join(words))
    return os.fsdecode(folder)


def test_names_that_are_not_utf8_train_generate_export_and_resume(picotron, strange, tiny):
    settings = (*tiny[:-4], "--data", f"{strange}/t\udce9xt", "--data.cache_dir", f"{strange}/c")
    ends = ("--run.dir", f"{strange}/r\udce9", "--name", "r\udce9", "--train.steps")
    code, out, err = picotron("train", *settings, *ends, "2")
    assert (code, err) == (0, ""), err
    assert "r\\udce9" in out
    run = f"{strange}/r\udce9/r\udce9"
    assert (Path(run) / "config.toml").read_bytes().count(b"\xe9") >= 4
    for words in (
        ("generate", run, "--prompt", "a", "--max-new-tokens", "2"),
        ("export", run, f"{strange}/m\udce9"),
        ("checkpoint", "verify", run),
        ("checkpoint", "inspect", run),
        ("train", "--resume", run, "--train.steps", "3"),
        ("train", "--resume", "auto", "--run.dir", f"{strange}/r\udce9", "--train.steps", "4"),
    ):
        code, out, err = picotron(*words)
        assert (code, err) == (0, ""), (words, err)
