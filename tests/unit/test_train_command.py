"""`picotron train` and `generate` from the command line, on real text, in seconds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import forge
import pytest
from PIL import Image
from transformers import AutoTokenizer

from picotron_core.parallel.parallelize import idle_settings
from picotron_core.schema import Parallel

# Each update multiplies the matrices by 1 - lr * weight_decay: -9999.
DIVERGES = ("--train.lr", "100", "--train.weight_decay", "100", "--train.warmup_steps", "0")


def metrics(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture
def trained(picotron, tiny, tmp_path):
    arguments = ("--name", "first", "--train.steps", "30", "--train.lr", "1e-2")
    code, out, err = picotron(
        "train", *tiny, *arguments, "--train.eval_every", "10", "--run.sample", "def "
    )
    assert (code, err) == (0, "")
    return tmp_path / "runs" / "first", out


def test_a_run_learns_and_leaves_everything_behind(trained):
    run, out = trained
    losses = metrics(run, "loss")
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert len(metrics(run, "val_loss")) == 3
    assert "--resume runs/first --train.steps 60 --train.decay_steps 30" in out

    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == [
        *("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "mfu", "step_s"),
        *("peak_memory_bytes", "loss_scale", "skipped"),
    ]
    assert (line["step"], line["tokens"]) == (1, 128)
    assert line["peak_memory_bytes"] > 1e6
    assert 0 < line["mfu"] < 2

    config = tomllib.loads((run / "config.toml").read_text())
    assert config["train"]["lr"] == 1e-2
    assert config["backends"] == {}
    backends = json.loads((run / "backends.json").read_text())
    assert {entry["op"] for entry in backends} == {
        *("attention", "norm", "rope", "swiglu", "loss", "optimizer", "comm")
    }
    assert json.loads((run / "environment.json").read_text())["device"]["type"] == "cpu"
    with Image.open(run / "loss.png") as picture:
        assert picture.size[0] > 400
    assert AutoTokenizer.from_pretrained(run / "tokenizer").eos_token == "<|endoftext|>"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000030"]

    for wanted in ("attention", "picotron/", "val_loss", "bits_per_byte", "A sample", "loss.png"):
        assert wanted in out, wanted
    assert "picotron train --resume runs/first" in out


def test_bits_per_byte_is_the_loss_per_byte_of_the_validation_text(trained, text_folder):
    run, _ = trained
    loss, bits = metrics(run, "val_loss")[-1], metrics(run, "bits_per_byte")[-1]
    bytes_per_token = loss / 0.6931471805599453 / bits
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    text = (text_folder / "heapq.py").read_text()
    # Of another text by the same tokenizer: the same within what texts differ by.
    assert bytes_per_token == pytest.approx(len(text) / len(tokenizer(text).input_ids), rel=0.35)


def test_generate_writes_the_same_text_for_the_same_seed(trained, picotron):
    write = ("generate", "runs/first", "--prompt", "import ", "--max-new-tokens", "20")
    code, first, err = picotron(*write, "--seed", "1")
    assert (code, err) == (0, "")
    assert first.startswith("import ")
    assert len(first) > len("import \n")
    assert picotron(*write, "--seed", "1")[1] == first
    assert picotron(*write, "--seed", "2")[1] != first
    greedy = picotron(*write, "--temperature", "0", "--seed", "1")[1]
    assert picotron(*write, "--top-k", "1", "--seed", "2")[1] == greedy
    assert picotron(*write, "--temperature", "0", "--backends", "naive-math")[1] == greedy


def test_generate_without_a_run_or_with_a_bad_flag(trained, picotron):
    code, _, err = picotron("generate", "runs/nowhere")
    assert code == 2
    assert "runs/nowhere is not a run" in err
    code, _, err = picotron("generate", "runs/first", "--prompt", "a", "--top-p", "2")
    assert code == 2
    assert "--top-p" in err


def test_a_run_is_never_overwritten(trained, picotron, tiny):
    run, _ = trained
    before = (run / "metrics.jsonl").read_bytes()
    code, out, _ = picotron("train", *tiny, "--name", "first", "--train.steps", "1")
    assert code == 0
    assert "runs/first-2" in out
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_losses_are_those_of_the_uninterrupted_run(picotron, tiny, tmp_path, dtype):
    if dtype == "bfloat16" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("bfloat16 is refused where it is not native")
    steps = ("--train.steps", "12", "--checkpoint.every", "4", "--checkpoint.keep", "3")
    steps += ("--train.eval_every", "6", "--train.dtype", dtype)
    assert picotron("train", *tiny, *steps, "--name", "whole")[0] == 0
    whole = tmp_path / "runs" / "whole"
    wanted = metrics(whole, "loss"), metrics(whole, "grad_norm"), metrics(whole, "val_loss")
    final = whole / "checkpoints" / "step-00000012"
    last = {path.name: path.read_bytes() for path in final.iterdir()}
    shutil.rmtree(final)
    code, out, _ = picotron("train", "--resume", "runs/whole")
    assert code == 0
    assert "step-00000008" in out
    found = metrics(whole, "loss"), metrics(whole, "grad_norm"), metrics(whole, "val_loss")
    assert found == wanted
    for path in final.glob("*.safetensors"):
        assert path.read_bytes() == last[path.name], path.name


def kinds(run: Path) -> list[tuple[int, bool]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], "val_loss" in line) for line in lines]


def test_resume_from_a_named_checkpoint_goes_on_from_there(every_save, picotron, tiny, tmp_path):
    steps = ("--train.steps", "6", "--checkpoint.every", "2", "--checkpoint.keep", "9")
    steps += ("--train.eval_every", "2")
    assert picotron("train", *tiny, *steps, "--name", "run")[0] == 0
    run = tmp_path / "runs" / "run"
    wanted = metrics(run, "loss"), kinds(run)
    assert wanted[1][-1] == (6, True)
    code, out, _ = picotron("train", "--resume", "runs/run/checkpoints/step-00000002")
    assert code == 0
    assert "step-00000002" in out
    assert (metrics(run, "loss"), kinds(run)) == wanted


def test_a_run_that_is_done_says_so(trained, picotron):
    run, _ = trained
    before = (run / "config.toml").read_bytes()
    code, _, err = picotron("train", "--resume", "runs/first", "--train.steps", "20")
    assert code == 2
    assert "already at step 30 of 20. Give --train.steps above 30" in err
    assert (run / "config.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--train.accumulation", "2"), "4 x 2 x 1 replicas = 8 samples, but has had 4 until now"),
        (("--train.micro_batch", "3"), "--train.micro_batch 2 --train.accumulation 2"),
        (
            ("--data.seq_len", "16"),
            "data.seq_len is 16, but the checkpoint's samples had 32",
        ),
        (("--train.seed", "7"), "train.seed is 7, but the checkpoint's samples were drawn with 0"),
    ],
)
def test_a_resume_that_would_repeat_or_skip_samples_is_refused(trained, picotron, flags, told):
    code, _, err = picotron("train", "--resume", "runs/first", "--train.steps", "40", *flags)
    assert code == 2
    assert told in err


def test_other_kernels_from_here_on_are_announced(trained, picotron):
    folder = max((trained[0] / "checkpoints").iterdir())
    manifest = forge.manifest_of(folder)
    entries = {entry["op"]: entry for entry in manifest["facts"]["backends"]}
    entries["norm"]["version"] = "0.0.1"
    entries["rope"]["op"] = "whirl"
    assert manifest["facts"]["torch"].startswith("2.")
    assert manifest["facts"]["device"].startswith("cpu")
    manifest["facts"] |= {"torch": "1.13.1", "device": "cuda Tesla K80"}
    forge.write_manifest(folder, manifest)
    more = ("--train.steps", "31", "--backends", "attention=naive-math")
    code, out, _ = picotron("train", "--resume", "runs/first", *more)
    assert code == 0
    told = " ".join(out.split())
    assert "attention was picotron/sdpa of picotron 0" in told
    assert "until now, is picotron/naive-math of picotron 0" in told
    assert re.search(r"norm was picotron/\S+ of \S+ 0.0.1 in float32 until now, is", told)
    assert "rope was not there until now, is" in told
    assert "whirl was" in told
    assert "torch was 1.13.1 until now, is 2." in told
    assert "the device was cuda Tesla K80 until now, is cpu" in told
    assert out.count("until now, is") == 6  # and of nothing else


def test_a_sample_that_does_not_fit_does_not_fail_the_run(picotron, tiny):
    more = ("--train.steps", "1", "--run.sample", "word " * 300)
    code, out, _ = picotron("train", *tiny, *more)
    assert code == 0
    assert "No sample: --prompt" in out


def test_auto_resumes_a_run_that_has_a_checkpoint(trained, picotron, tiny):
    assert picotron("train", *tiny, "--name", "nan", *DIVERGES)[0] == 1
    code, out, _ = picotron("train", "--resume", "auto", "--train.steps", "31")
    assert code == 0
    assert "learning-rate plan changes: train.steps 30 -> 31: at step 31 the rate is" in out
    assert "runs/first" in out


def test_a_run_of_a_name_begins_or_goes_on(picotron, tiny, tmp_path):
    command = ("train", *tiny, "--run.resume", "true", "--train.steps")
    code, _, err = picotron(*command, "2")
    assert code == 2
    assert "give it by --run.name" in err
    run = tmp_path / "runs" / "again"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 5}\n')  # of a start that saved nothing
    assert picotron(*command, "2", "--name", "again")[0] == 0
    assert metrics(run, "step") == [1, 2, 2]  # the last is the evaluation
    code, out, _ = picotron(*command, "3", "--name", "again")
    assert code == 0
    assert "resumed from" in out
    assert metrics(run, "step") == [1, 2, 2, 3, 3]
    assert [path.name for path in run.parent.iterdir()] == ["again"]


def test_the_picture_holds_the_last_evaluation(picotron, tiny, tmp_path):
    """The run ends on a checkpoint and an evaluation at once: the picture comes after both."""
    steps = ("--train.steps", "4", "--checkpoint.every", "4", "--train.eval_every", "4")
    assert picotron("train", *tiny, *steps, "--name", "run")[0] == 0
    with Image.open(tmp_path / "runs" / "run" / "loss.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
    assert (0xD9, 0x48, 0x01) in colours


def test_a_damaged_checkpoint_is_passed_over_by_name(picotron, tiny, tmp_path):
    steps = ("--train.steps", "4", "--checkpoint.every", "2", "--checkpoint.keep", "2")
    assert picotron("train", *tiny, *steps, "--name", "run")[0] == 0
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    weights = checkpoints / "step-00000004" / "rank-00000.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 1
    weights.write_bytes(damaged)
    code, out, _ = picotron("train", "--resume", "auto", "--train.steps", "5")
    assert code == 0
    assert "step-00000004/rank-00000.safetensors is damaged" in out
    assert len(metrics(tmp_path / "runs" / "run", "loss")) == 5
    # What a killed writer leaves has no manifest, and is no checkpoint.
    (checkpoints / "step-00000009").mkdir()
    assert picotron("generate", "runs/run", "--prompt", "a", "--max-new-tokens", "1")[0] == 0


def test_ctrl_c_saves_and_says_how_to_resume(tiny, tmp_path):
    """A real process and a real signal, sent once the run is seen to be under way."""
    command = [sys.executable, "-m", "picotron_core.cli", "train", *tiny]
    command += ["--name", "stopped", "--train.steps", "100000", "--run.log_every", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if re.match(r"step +3 ", line):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen + rest
    assert "picotron train --resume runs/stopped" in rest
    run = tmp_path / "runs" / "stopped"
    steps = metrics(run, "loss")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{len(steps):08d}"
    assert (run / "loss.png").exists()


TOO_LARGE = ("--model.hidden_size", "131072", "--model.intermediate_size", "4194304")
ERRORS = {
    "missing data": (("--data", "no/such/file.txt"), 2, "No file or folder 'no/such/file.txt'"),
    "unknown backend": (("--backends", "attention=spda"), 2, "Did you mean 'sdpa'?"),
    "unknown op": (("--backends", "atention=sdpa"), 2, "Did you mean 'attention'?"),
    "impossible backend": (("--backends", "comm=nccl"), 2, "Backend 'nccl', from the command line"),
    "unknown setting": (("--train.step", "3"), 2, "Did you mean 'train.steps'?"),
    "ill-typed setting": (("--train.steps", "x"), 2, "train.steps = 'x'"),
    "no config file": (("nowhere.toml",), 2, "No config file nowhere.toml"),
    "no CUDA": (("--run.device", "cuda"), 2, "torch sees no CUDA device"),
    "run.dir is a file": (("--run.dir", "/dev/null/x"), 1, "Cannot make the run directory"),
    "too large a model": (TOO_LARGE, 2, "Out of memory: a step takes"),
    "NaN": (DIVERGES, 1, "Lower train.lr"),
    "no resume": (("--resume", "runs/none"), 2, "is not a run"),
    "vocabulary": (("--data.vocab_size", "3"), 2, "data.vocab_size = 3"),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_a_mistake_is_one_line_that_says_what_to_do(picotron, tiny, tmp_path, mistake):
    arguments, wanted_code, message = ERRORS[mistake]
    given = tiny if "--resume" not in arguments else ()
    code, _, err = picotron("train", *given, "--name", "bad", "--train.steps", "8", *arguments)
    assert message in err
    assert code == wanted_code
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    if code == 2:
        assert not (tmp_path / "runs" / "bad").exists()


def test_a_sequence_longer_than_the_data(picotron, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("a few words, and no more than these")
    more = ("--data", str(tmp_path / "short.txt"), "--data.seq_len", "100")
    start = tiny.index("--data")
    given = tiny[:start] + tiny[start + 2 :]
    code, _, err = picotron("train", *given, *more)
    assert code == 2
    assert "--data.seq_len" in err


def test_an_empty_corpus(picotron, tiny, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    start = tiny.index("--data")
    code, _, err = picotron("train", *tiny[:start], "--data", str(tmp_path / "blank.txt"))
    assert code == 2
    assert "The corpus is empty" in err


def test_a_corrupt_token_cache(picotron, tiny, tmp_path):
    cache = ("--data.cache_dir", str(tmp_path / "cache"))
    assert picotron("train", *tiny, *cache, "--train.steps", "1")[0] == 0
    (tokens,) = (tmp_path / "cache").glob("*/train.bin")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    code, _, err = picotron("train", *tiny, *cache, "--train.steps", "1")
    assert code == 1
    assert f"Delete the folder {tokens.parent}" in err


def test_debug_shows_the_traceback(picotron):
    code, _, err = picotron("train", "nowhere.toml", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("error: No config file")


def test_what_is_set_and_changes_nothing_is_told(picotron, tiny):
    idle = {
        "parallel.zero": "1",
        "parallel.sequence": "true",
        "parallel.schedule": "afab",
    }
    flags = [word for key, value in idle.items() for word in (f"--{key}", value)]
    code, out, _ = picotron("train", *tiny, *flags, "--train.steps", "1")
    assert code == 0
    for key in idle:
        assert re.search(rf"WARNING: {key} .*: it changes nothing here", out), key


@pytest.mark.parametrize(
    ("settings", "replicas", "told"),
    [
        ({}, 1, []),
        ({"zero": 1}, 2, []),
        ({"zero": 1, "cp": 2}, 1, []),
        ({"zero": 1, "tp": 2}, 1, ["parallel.zero"]),
        ({"sequence": True, "tp": 2}, 1, []),
        ({"sequence": True, "pp": 2}, 1, ["parallel.sequence"]),
        ({"schedule": "interleaved", "chunks": 3, "pp": 2}, 1, []),
        ({"schedule": "interleaved", "chunks": 3}, 1, ["parallel.schedule"]),
        ({"chunks": 3, "pp": 2}, 1, ["parallel.chunks"]),
    ],
)
def test_a_setting_is_idle_where_its_layout_is_not(settings, replicas, told):
    idle = list(idle_settings(Parallel(**settings), replicas=replicas))
    assert [sentence.split()[0] for sentence in idle] == told


def test_a_named_loss_is_refused_where_the_vocabulary_is_divided(picotron, tiny):
    """It would not run: the divided one has a loss of its own."""
    divided = ("plan", *tiny, "--nproc", "2", "--parallel.tp", "2")
    code, _, err = picotron(*divided, "--backends", "loss=naive-math")
    assert code == 2
    assert "loss=naive-math is asked for (command line), but parallel.tp = 2" in err
    for wish in ("loss=naive-math,auto", "naive-math"):
        assert picotron(*divided, "--backends", wish)[0] == 0
