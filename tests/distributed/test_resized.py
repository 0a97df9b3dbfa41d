"""A vocabulary that grew, divided among ranks, is the one that one rank has."""

from __future__ import annotations

import json

import families
import pytest
import torch
from transformers import AutoModelForCausalLM


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_added_rows_are_divided_saved_and_resumed(picotron, tmp_path, run_ranks, tied):
    base = tmp_path / "base"
    tokenizer = families.save_tokenizer("llama3", base)
    families.save_model(base, len(tokenizer), tie_word_embeddings=tied)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", " fox"])
    tokenizer.save_pretrained(base)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(families.text_of(3, 150)))
    train = [
        *("train", "--model.path", str(base), "--model.resize_embeddings", "true"),
        *("--data", str(text), "--data.cache_dir", str(tmp_path / "cache")),
        *("--data.seq_len", "16", "--data.val_fraction", "0.2", "--train.micro_batch", "4"),
        *("--train.steps", "4", "--checkpoint.every", "2", "--train.warmup_steps", "1"),
        *("--train.eval_samples", "4", "--train.dtype", "float32", "--run.device", "cpu"),
        *("--run.dir", str(tmp_path / "runs")),
    ]
    assert picotron(*train, "--name", "one")[0] == 0
    module = ["-m", "picotron_core.cli"]
    divided = ["--name", "two", "--parallel.tp", "2"]
    results = run_ranks([*module, *train, *divided], world_size=2)
    assert [result.returncode for result in results] == [0, 0], results
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert metrics(two) == pytest.approx(metrics(one), rel=1e-4)

    middle = str(two / "checkpoints" / "step-00000002")
    code, _, err = picotron("train", "--resume", middle, "--parallel.tp", "1")
    assert code == 0, err
    assert metrics(two) == pytest.approx(metrics(one), rel=1e-4)
    assert picotron("export", str(two), "out")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = model.model.embed_tokens.weight
    assert len(rows) == len(tokenizer)
    # " fox" was met in training, the others were not: they moved from the mean differently.
    assert not torch.equal(rows[-1], rows[-2])
