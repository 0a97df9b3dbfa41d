"""`picotron checkpoint`, `export` and `verify-resume`, on a run of seconds."""

from __future__ import annotations

import json
import os
import re

import forge
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SAVES = ("--train.steps", "6", "--checkpoint.every", "2", "--checkpoint.keep", "9")


@pytest.fixture
def run(every_save, picotron, tiny, tmp_path):
    assert picotron("train", *tiny, *SAVES, "--name", "run")[0] == 0
    return tmp_path / "runs" / "run"


def test_list_verify_inspect_and_prune(run, picotron):
    code, out, _ = picotron("checkpoint", "list", "runs/run")
    assert code == 0
    for wanted in ("step-00000002", "step-00000004", "step-00000006", "768", "one rank"):
        assert wanted in out, wanted
    code, out, _ = picotron("checkpoint", "verify", "runs/run")
    assert (code, out.count("whole")) == (0, 3)
    code, out, _ = picotron("checkpoint", "inspect", "runs/run/checkpoints/step-00000004")
    assert code == 0
    for wanted in ("step 4, 512 tokens, 16 samples (4 a step), seed 0", "attention=picotron/sdpa"):
        assert wanted in out, wanted

    file = run / "checkpoints" / "step-00000006" / forge.FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, _ = picotron("checkpoint", "verify", "runs/run")
    assert (code, out.count("whole")) == (1, 2)
    assert "rank-00000.safetensors is damaged" in out.replace("\n", "")
    code, out, _ = picotron("checkpoint", "prune", "runs/run", "--keep", "1")
    assert code == 0
    assert "removed step-00000002" in out
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000006"]  # the damaged one does not count
    assert picotron("checkpoint", "list", "runs/nowhere")[0] == 2


@pytest.mark.parametrize("tied", ["true", "false"])
def test_what_is_exported_computes_the_same_in_transformers(picotron, tiny, tmp_path, tied):
    more = ("--train.steps", "2", "--model.tie_word_embeddings", tied, "--name", "run")
    assert picotron("train", *tiny, *more, "--backends", "naive-math")[0] == 0
    code, out, err = picotron("export", "runs/run", "model", "--shard-mb", "0.05")
    assert (code, err) == (0, "")
    assert "AutoModelForCausalLM.from_pretrained('model')" in out
    folder = tmp_path / "model"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert max(file.stat().st_size for file in folder.glob("model-*")) < 60_000
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("import os\n\ndef main(", return_tensors="pt").input_ids
    assert theirs.config.eos_token_id == tokenizer.eos_token_id

    code, _, err = picotron("export", "runs/run", "one")
    assert (code, err) == (0, "")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert whole.keys() == index["weight_map"].keys()
    for name, tensor in whole.items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    # As picotron continues a text, so does transformers, from the other folder.
    write = ("generate", "runs/run", "--prompt", "import os\n\ndef main(", "--temperature", "0")
    _, text, _ = picotron(*write, "--max-new-tokens", "8", "--backends", "naive-math")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    wanted = again.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.rstrip("\n") == tokenizer.decode(wanted[0]).rstrip("\n")
    assert picotron("export", "runs/run", "one")[0] == 2  # never over what is there


def validation_loss(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["val_loss"] for line in reversed(lines) if "val_loss" in line)


def test_what_is_exported_is_trained_further(picotron, tiny, tmp_path):
    """Fine-tuning: from the folder's weights, by its tokenizer, with an optimizer of its own."""
    assert picotron("train", *tiny, "--train.steps", "6", "--name", "run")[0] == 0
    assert picotron("export", "runs/run", "model", "--shard-mb", "0.05")[0] == 0
    own = [
        word
        for pair in zip(tiny[::2], tiny[1::2], strict=True)
        if not pair[0].startswith("--model.")
        for word in pair
    ]
    more = ("--model.path", "model", "--train.steps", "1", "--train.lr", "1e-12")
    code, _, err = picotron("train", *own, *more, "--name", "further")
    assert (code, err) == (0, "")
    runs = tmp_path / "runs"
    found, right = (validation_loss(runs / name) for name in ("further", "run"))
    assert found == pytest.approx(right, rel=1e-6)
    code, _, _ = picotron("train", *own, *more, "--model.pretrained", "false", "--name", "afresh")
    assert code == 0
    assert abs(validation_loss(runs / "afresh") / right - 1) > 1e-3


def test_a_resumed_run_is_verified(picotron, tiny):
    code, out, err = picotron("verify-resume", *tiny, "--steps", "4")
    assert (code, err) == (0, "")
    assert "step 2 resumed to 4 on one rank" in out
    assert "EQUAL: " in out


def test_the_first_tensor_that_differs_is_named(picotron, tiny):
    code, out, err = picotron("verify-resume", *tiny, "--steps", "4", "--then", "train.lr=0.5")
    assert (code, err) == (1, "")
    assert "DIFFERENT: master of model.embed_tokens.weight: the first tensor that is" in out
    code, _, err = picotron("verify-resume", *tiny, "--train.accumulation", "0")
    assert code == 1
    assert "train.accumulation" in err


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks")
@pytest.mark.slow
def test_a_run_resumed_by_another_layout_is_verified(picotron, tiny):
    other = ("--then-nproc", "2", "--then", "parallel.cp=2")
    code, out, err = picotron("verify-resume", *tiny, "--steps", "4", *other)
    assert (code, err) == (0, "")
    assert "ALIKE: " in out
    (first, second) = re.findall(r"the loss of step 3: ([\d.]+), resumed ([\d.]+)", out)[0]
    assert float(second) == pytest.approx(float(first), rel=1e-6)
