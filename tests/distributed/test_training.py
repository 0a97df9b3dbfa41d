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
    for key in ("grad_norm", "tokens"):
        found, wanted = (losses(tmp_path / name, key) for name in ("two", "one"))
        assert found == pytest.approx(wanted, rel=1e-4), key
    found, wanted = (losses(tmp_path / name, "val_loss") for name in ("two", "one"))
    assert found == pytest.approx(wanted, rel=1e-5)
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


def test_two_ranks_resume_what_two_ranks_saved(tiny, tmp_path, run_ranks):
    more = ("--name", "two", "--checkpoint.every", "3", "--checkpoint.keep", "5")
    run_ranks(command(tiny, tmp_path, *more), world_size=2)
    wanted = losses(tmp_path / "two")
    assert len(wanted) == 6
    resume = ["-m", "picotron_core.cli", "train", "--resume"]
    resume.append(str(tmp_path / "two" / "checkpoints" / "step-00000003"))
    results = run_ranks(resume, world_size=2)
    assert [result.returncode for result in results] == [0, 0], results
    assert losses(tmp_path / "two") == wanted  # bit for bit


def test_what_two_ranks_divided_one_resumes_whole(picotron, tiny, tmp_path, run_ranks):
    """ZeRO-1's checkpoint holds whole tensors: it is that of any other layout."""
    more = ("--name", "two", "--parallel.zero", "1", "--train.micro_batch", "2")
    saves = ("--checkpoint.every", "3", "--checkpoint.keep", "5")
    results = run_ranks(command(tiny, tmp_path, *more, *saves), world_size=2)
    assert [result.returncode for result in results] == [0, 0], results
    wanted = losses(tmp_path / "two")
    middle = tmp_path / "two" / "checkpoints" / "step-00000003"
    one = ("--parallel.zero", "0", "--train.micro_batch", "4")
    code, out, err = picotron("train", "--resume", str(middle), *one)
    assert code == 0, out + err
    assert losses(tmp_path / "two") == pytest.approx(wanted, rel=1e-5)
    # and back: the state of one is divided again
    back = ["-m", "picotron_core.cli", "train", "--resume", str(middle), *more[2:]]
    results = run_ranks(back, world_size=2)
    assert [result.returncode for result in results] == [0, 0], results
    assert losses(tmp_path / "two") == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ("--parallel.tp", "2", "--parallel.sequence", "true"),
        ("--parallel.pp", "2", "--train.micro_batch", "2", "--train.accumulation", "2"),
        ("--parallel.cp", "2", "--data.document_mask", "true", "--trace"),
    ],
)
def test_two_ranks_with_a_part_each_train_the_run_of_one(
    picotron, tiny, tmp_path, run_ranks, flags
):
    more = ("--name", "two", *flags)
    same = flags[2:4] if "--data.document_mask" in flags else ()
    assert picotron(*command(tiny, tmp_path, "--name", "one", *same)[2:])[0] == 0
    results = run_ranks(command(tiny, tmp_path, *more, "--checkpoint.every", "3"), world_size=2)
    assert [result.returncode for result in results] == [0, 0], results
    for key, rel in (("loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4), ("tokens", 0)):
        found, wanted = (losses(tmp_path / name, key) for name in ("two", "one"))
        assert found == pytest.approx(wanted, rel=rel), key
    if "--trace" in flags:
        check_ring(picotron, tmp_path / "two")
    middle = str(tmp_path / "two" / "checkpoints" / "step-00000003")
    alone = [f"--parallel.{axis}=1" for axis in ("pp", "cp", "tp")]
    alone += ["--parallel.sequence=false"]
    assert picotron("train", "--resume", middle, *alone)[0] == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def check_ring(picotron, run: Path) -> None:
    """In each of two layers, forward and backward, a rank has its own keys first, then the
    other's, which were on their way meanwhile.
    """
    sent = 2 * 4 * 2 * 16 * 8 * 4  # k and v of a micro-batch: K 2, T/cp 16, D 8, float32
    for rank in (0, 1):
        events = json.loads((run / "trace" / f"rank-000{rank}.json").read_text())["traceEvents"]
        step = [event for event in events if event["args"].get("step") == 3]
        turns = [event["args"] for event in step if event["name"] == "ring"]
        assert [(turn["turn"], turn["block"]) for turn in turns] == [(0, rank), (1, 1 - rank)] * 4
        ways = [(turn["direction"], turn.get("layer")) for turn in turns]
        assert ways == [("forward", 0)] * 2 + [("forward", 1)] * 2 + [("backward", None)] * 4
        calls = [event["args"] for event in step if event["name"] == "send"]
        # then the keys once more, and their gradients by every rank, the last of them home
        assert [call["bytes"] for call in calls] == [sent] * 2 + [sent] * 3 * 2
        assert {call["axis"] for call in calls} == {"cp"}
        attended = [e for e in step if e["name"] == "attention" and "turn" in e["args"]]
        assert {event["args"]["block"] for event in attended} == {0, 1}
    code, out, err = picotron("trace", str(run))
    assert (code, err) == (0, "")
    assert "ring.png" in out
    assert (run / "trace" / "ring.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--parallel.tp", "3"), "does not divide the model's num_attention_heads"),
        (("--parallel.pp", "3"), "3 stages need 3 layers, but the model has 2"),
        (("--parallel.cp", "3"), "cuts each sequence into 6 chunks, but data.seq_len is"),
        (("--parallel.tp", "2"), "2 ranks hold one copy of the model, but there are 1 ranks"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_before_any_data(picotron, tiny, tmp_path, flags, told):
    code, _, err = picotron(*command(tiny, tmp_path, "--name", "odd", *flags)[2:])
    assert code == 2
    assert told in err
    assert not (tmp_path / "odd").exists()


def test_a_rank_that_cannot_start_is_named_by_the_others(tiny, tmp_path, run_ranks):
    """Long before the timeout of 600 s, which would end this test at 120."""
    env = [{}, {"PICOTRON_BACKENDS": "attention=spda"}]
    results = run_ranks(command(tiny, tmp_path, "--name", "odd"), world_size=2, env=env)
    assert results[0].returncode == 1
    assert "Rank 1 failed in start-up: Backends from the env" in results[0].stderr
    assert results[1].returncode == 2
    assert "Did you mean 'sdpa'?" in results[1].stderr
    for result in results:
        assert "Traceback" not in result.stderr


def test_ranks_with_other_settings_stop(tiny, tmp_path, run_ranks):
    arguments = command(tiny, tmp_path, "--name", "odd")
    script = (
        "import os, sys\n"
        "from picotron_core.cli import main\n"
        "own = ['--train.seed', '7'] if os.environ['RANK'] == '1' else []\n"
        "sys.argv = ['picotron', *sys.argv[1:], *own]\n"
        "main()"
    )
    results = run_ranks(["-c", script, *arguments[2:]], world_size=2)
    for result in results:
        assert result.returncode == 2, result
        assert "Ranks disagree on settings" in result.stderr


def test_torchruns_variables_in_part_are_an_error(run_ranks, tiny, tmp_path):
    env = [{"MASTER_ADDR": ""}, {"MASTER_ADDR": ""}]
    for result in run_ranks(command(tiny, tmp_path), world_size=2, env=env):
        assert result.returncode == 2
        assert "the environment lacks MASTER_ADDR. Start with torchrun" in result.stderr


def test_the_division_is_by_the_valid_tokens_of_all_ranks(run_ranks):
    """The ranks' own means, averaged, would weigh 2 tokens of one like 16 of the other."""
    script = [str(Path(__file__).with_name("uneven_step.py"))]
    found = []
    for world_size in (1, 2):
        for result in run_ranks(script, world_size):
            assert result.returncode == 0, result.stderr
            found.append([float(word) for word in result.stdout.split()])
    alone, *together = found
    assert alone[2] == 18
    for numbers in together:
        assert numbers == pytest.approx(alone, rel=1e-5)
