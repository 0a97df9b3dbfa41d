"""Several processes train the run of one, and do not start where they disagree."""

import json
from pathlib import Path

import pytest


def losses(run: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def command(tiny, folder: Path, *more: str) -> list[str]:
    module = ["-m", "picotron_core.cli", "train"]
    return [*module, *tiny, "--run.dir", str(folder), "--train.steps", "6", *more]


def test_two_ranks_train_the_run_of_one(picotron, tiny, tmp_path, run_ranks):
    """The same global batch: 4 samples on one rank, 2 on each of two."""
    assert picotron(*command(tiny, tmp_path, "--name", "one")[2:])[0] == 0
    results = run_ranks(
        command(tiny, tmp_path, "--name", "two", "--train.micro_batch", "2"), world_size=2
    )
    assert [result.returncode for result in results] == [0, 0], results
    assert results[1].stdout == ""
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    found, wanted = (losses(tmp_path / name, "val_loss") for name in ("two", "one"))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert losses(tmp_path / "two", "tokens") == losses(tmp_path / "one", "tokens")
    selected = json.loads((tmp_path / "two" / "backends.json").read_text())
    assert {entry["op"]: entry["backend"] for entry in selected}["comm"] == "picotron/gloo-cpu"


def test_ranks_that_select_differently_stop_and_say_who(tiny, tmp_path, run_ranks):
    env = [{}, {"PICOTRON_BACKENDS": "norm=naive-math;attention=naive-math"}]
    results = run_ranks(command(tiny, tmp_path, "--name", "odd"), world_size=2, env=env)
    for result in results:
        assert result.returncode == 2
        assert "Ranks disagree on attention: rank 0 has picotron/" in result.stderr
        assert "rank 1 has picotron/naive-math" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "odd").exists()
