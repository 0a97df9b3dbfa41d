"""Ranks with different cards agree on one dtype and on backends that all of them have."""

import json

CARDS = [{"PICOTRON_DEVICE": "a100"}, {"PICOTRON_DEVICE": "t4"}]


def command(tiny, folder, name, *more):
    # The device is the rank's own here, and the dtype what follows from both.
    kept = [
        word for word in tiny if word not in ("--run.device", "cpu", "--train.dtype", "float32")
    ]
    run = ["--run.dir", str(folder), "--name", name, "--train.steps", "2"]
    return ["-m", "picotron_core.cli", "train", *kept, *run, *more]


def test_the_best_dtype_and_backends_that_all_have(tiny, tmp_path, run_ranks):
    results = run_ranks(command(tiny, tmp_path, "mixed"), world_size=2, env=CARDS)
    assert [result.returncode for result in results] == [0, 0], results
    out = results[0].stdout
    assert "SIMULATED" in out
    assert "dtype  float16 (Tesla T4 sm_75 (simulated) has it in hardware, and no bfloat16" in out
    selected = json.loads((tmp_path / "mixed" / "backends.json").read_text())
    assert {entry["dtype"] for entry in selected if entry["op"] == "attention"} == {"float16"}
    lines = (tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line).get("loss_scale", 1) for line in lines)


def test_a_dtype_that_one_rank_lacks_stops_all(tiny, tmp_path, run_ranks):
    asked = command(tiny, tmp_path, "lacks", "--train.dtype", "bfloat16")
    for result in run_ranks(asked, world_size=2, env=CARDS):
        assert result.returncode == 2
        assert "Tesla T4" in result.stderr
        assert "Use --train.dtype float16" in result.stderr
        assert "Traceback" not in result.stderr
