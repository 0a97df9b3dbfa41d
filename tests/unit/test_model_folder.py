"""A model folder that is damaged, of another kind or hostile is one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    layer = "model.layers.0."
    matrices = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    mlp = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    return {
        "model.embed_tokens.weight": (300, 32),
        "lm_head.weight": (300, 32),
        "model.norm.weight": (32,),
        **{f"{layer}self_attn.{name}.weight": shape for name, shape in matrices.items()},
        **{f"{layer}mlp.{name}.weight": shape for name, shape in mlp.items()},
        f"{layer}input_layernorm.weight": (32,),
        f"{layer}post_attention_layernorm.weight": (32,),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def ask(picotron, whole: Path, tmp_path: Path, text_folder, cache_dir):
    """Train one step from a copy of the folder that was changed -> exit code and error."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)

    def ask(change: Callable[[Path], object], name: str = "model") -> tuple[int, str]:
        change(folder)
        code, out, err = picotron(
            *("train", "--model.path", name, "--data", str(text_folder), "--train.steps", "1"),
            *("--data.seq_len", "16", "--train.micro_batch", "1", "--run.device", "cpu"),
            *("--data.tokenizer", "nowhere/at-all" if name != "model" else ""),
            *("--data.cache_dir", str(cache_dir), "--train.eval_samples", "1"),
        )
        assert "Traceback" not in out + err
        return code, err

    return ask


def config(**changes: Any) -> Callable[[Path], object]:
    """The config.json with these keys; None removes one."""

    def change(folder: Path) -> None:
        keys = CONFIG | changes
        text = json.dumps({key: value for key, value in keys.items() if value is not Ellipsis})
        (folder / "config.json").write_text(text)

    return change


def written(data: bytes | str, name: str = "config.json") -> Callable[[Path], object]:
    content = data if isinstance(data, bytes) else data.encode()
    return lambda folder: (folder / name).write_bytes(content)


def only(*names: str) -> Callable[[Path], object]:
    """The folder with these empty files alone."""

    def change(folder: Path) -> None:
        for path in list(folder.iterdir()):
            if path.name not in names:
                path.unlink()
        for name in names:
            (folder / name).touch()

    return change


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def loop(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def as_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def sparse(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**10)


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "empty": (written(""), "cannot be read as JSON"),
    "an array": (written("[1, 2]"), "holds no JSON object, but a list"),
    "null": (written("null"), "holds no JSON object, but a NoneType"),
    "a number": (written("3"), "holds no JSON object, but a int"),
    "deep nesting": (written("[" * 200_000), "cannot be read as JSON: it is nested too deeply"),
    "UTF-16": (written(json.dumps(CONFIG).encode("utf-16")), "cannot be read as JSON"),
    "bytes": (written(bytes(range(256))), "cannot be read as JSON"),
    "a huge number": (written('{"hidden_size": ' + "9" * 9000 + "}"), "cannot be read as JSON"),
    "an error page": (written("<!DOCTYPE html><html>"), "cannot be read as JSON"),
    "a pointer of Git LFS": (written("version https://git-lfs.github.com/spec/v1\n"), "as JSON"),
    "a pipe": (pipe, "not a plain file"),
    "a loop of links": (loop, "cannot be read as JSON"),
    "a folder": (as_folder, "config.json"),
    "ten gigabytes": (sparse, "it has more than"),
    "an object of nothing": (written("{}"), "No model_type. Supported: llama"),
    "text for a size": (config(hidden_size="512"), "hidden_size is '512', but it must be a whole"),
    "null for a size": (config(hidden_size=None), "hidden_size is None"),
    "a float for a size": (config(num_hidden_layers=2.0), "num_hidden_layers is 2.0"),
    "true for a size": (config(num_hidden_layers=True), "num_hidden_layers is True"),
    "a list for a size": (config(vocab_size=[300]), "vocab_size is [300]"),
    "2**63": (config(hidden_size=2**63), "hidden_size is 9223372036854775808, but"),
    "2**40 layers": (config(num_hidden_layers=2**40), "num_hidden_layers is 1099511627776"),
    "10**4000": (config(intermediate_size=10**4000), "intermediate_size is 1000"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "heads that do not divide": (config(num_attention_heads=5), "num_attention_heads = 5"),
    "no key heads": (config(num_key_value_heads=0), "num_key_value_heads is 0"),
    "key heads as text": (config(num_key_value_heads="2"), "num_key_value_heads is '2'"),
    "a head of 0": (config(head_dim=0), "head_dim is 0"),
    "more heads than width": (
        config(num_attention_heads=64, num_key_value_heads=64),
        "head_dim is 0",
    ),
    "an epsilon of text": (config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "an epsilon of nothing": (config(rms_norm_eps=1e-300), "rms_norm_eps is 1e-300"),
    "a base of infinity": (config(rope_theta=float("inf")), "rope_theta is inf"),
    "a base of nan": (config(rope_theta=float("nan")), "rope_theta is nan"),
    "rope as a list": (config(rope_scaling=[1]), "rope_parameters is [1], but it must be a table"),
    "rope as text": (config(rope_parameters="linear"), "rope_parameters is 'linear'"),
    "a factor of a list": (
        config(rope_scaling={"type": "linear", "factor": [2]}),
        "factor is [2], but",
    ),
    "an unknown rope": (
        config(rope_scaling={"type": "yarn", "factor": 2.0}),
        "rope_type is 'yarn'",
    ),
    "a rope type of a list": (config(rope_scaling={"type": ["linear"]}), "rope_type"),
    "tied by text": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
    "an end of text": (config(eos_token_id="</s>"), "eos_token_id"),
    "an end in lists": (config(eos_token_id=[[2]]), "eos_token_id"),
    "a beginning of a table": (config(bos_token_id={"a": 1}), "bos_token_id is {'a': 1}"),
    "a huge beginning": (config(bos_token_id=2**70), "bos_token_id is 118059"),
    "padding by a list": (config(pad_token_id=[3]), "pad_token_id is [3]"),
    "biases": (config(attention_bias=True), "attention_bias is True, but it must be False"),
    "an activation of a list": (config(hidden_act=["silu"]), "hidden_act is ['silu']"),
    "quantised": (config(quantization_config={"bits": 4}), "quantised (quantization_config)"),
    "code as a number": (config(auto_map=3, model_type="x"), "Unsupported model_type 'x'"),
    **{
        family: (config(model_type=family), f"Unsupported model_type '{family}'. Supported: llama")
        for family in ("mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "Llama", "mamba")
    },
    "a family of a list": (config(model_type=["llama"]), "Unsupported model_type ['llama']"),
    "a longer context than it has": (config(max_position_embeddings=8), "data.seq_len = 16 is"),
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), "an adapter (LoRA)"),
    "GGUF": (only("model-Q4_K_M.gguf"), "GGUF files, whose weights are quantised"),
    "a run": (only("config.toml", "checkpoints"), "a run of Picotron. Export it first"),
    "nothing": (only(), "holds no config.json"),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_config_that_is_wrong_is_named(ask, mistake):
    change, wanted = CONFIGS[mistake]
    code, err = ask(change)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    assert wanted in err
    assert "bug" not in err


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no/such/folder/at/all", "No model folder 'no/such/folder/at/all'"),
        ("./nowhere", "No model folder"),
        ("/dev/null", "is a file"),
        ("model/config.json", "is a file"),
        ("model.gguf", "is a GGUF file"),
        ("x" * 300, "cannot be looked at: File name too long"),
        ("a b", "neither a folder here nor a repository"),
        ("team//x", "No model folder"),
        ("caf\udce9", "neither a folder here nor a repository"),
        ("./caf\udce9", "No model folder"),
        ("\x1b[31m", "neither a folder here nor a repository"),
        ("~nobody-of-that-name/x", "no such home folder"),
    ],
)
def test_what_is_no_folder_is_said(ask, tmp_path, name, wanted):
    code, err = ask(lambda _: (tmp_path / "model.gguf").touch(), name)
    assert (code, err.count("\n")) == (2, 1), err
    assert wanted in err
    assert err.isprintable() or err[:-1].isprintable()


# Weights: `stored_weights` alone, for no text need be read.


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return rewrite


def index(weight_map: Any, **more: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        text = json.dumps({"weight_map": weight_map, **more} if weight_map is not ... else more)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def every(file: object) -> dict[str, object]:
    return dict.fromkeys(shapes(), file)


def header(data: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))

    return change


def cut(folder: Path, size: int) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size)


NORM, HEAD = "model.norm.weight", "lm_head.weight"
WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (only("config.json"), "holds neither model.safetensors nor"),
    "pickles": (only("config.json", "pytorch_model.bin"), "pickled weights (.bin)"),
    "of llama's own": (only("config.json", "consolidated.00.pth"), "pickled weights (.pth)"),
    "of TensorFlow": (only("config.json", "tf_model.h5"), "TensorFlow's weights"),
    "of an adapter": (only("config.json", "adapter_config.json"), "an adapter (LoRA)"),
    "empty": (partial(cut, size=0), "model.safetensors cannot be read"),
    "seven bytes": (partial(cut, size=7), "model.safetensors cannot be read"),
    "cut in the header": (partial(cut, size=500), "model.safetensors cannot be read"),
    "cut at the end": (partial(cut, size=20_000), "model.safetensors cannot be read"),
    "no JSON in the header": (header(b"{" * 64), "model.safetensors cannot be read"),
    "a list in the header": (header(b"[1, 2]"), "model.safetensors cannot be read"),
    "no UTF-8 in the header": (header(b'{"\xff": 1}'), "model.safetensors cannot be read"),
    "an endless header": (written(b"\xff" * 64, "model.safetensors"), "cannot be read"),
    "a page of errors": (written("<html>" * 99, "model.safetensors"), "cannot be read"),
    "an index of nothing": (index(...), "has no weight_map"),
    "an index of a list": (index([1]), "has no weight_map"),
    "an index of no names": (index({NORM: ["one.safetensors"]}), "is not a file beside it"),
    "a shard that is not there": (index(every("two.safetensors")), "names 'two.safetensors'"),
    "a shard outside": (index(every("../whole.safetensors")), "names '../whole.safetensors'"),
    "a shard by its path": (index(every("/etc/passwd")), "names '/etc/passwd'"),
    "a shard with a long name": (index(every("x" * 400)), "which is not a file beside it"),
    "a shard of nothing": (index(every("")), "names ''"),
    "the folder as a shard": (index(every(".")), "names '.'"),
    "the config as a shard": (index(every("config.json")), "cannot be read"),
    "a tensor that the shard lacks": (
        index({**every("one.safetensors"), "model.extra.weight": "one.safetensors"}),
        "model.extra.weight",
    ),
    "a tensor missing": (tensors(lambda t: t.pop(NORM)), f"lack {NORM}"),
    "a tensor too many": (
        tensors(lambda t: t.update({"model.layers.1.x": torch.ones(2)})),
        "model.layers.1.x",
    ),
    "another shape": (tensors(lambda t: t.update({NORM: torch.ones(31)})), "is (31,), but"),
    "no shape": (tensors(lambda t: t.update({NORM: torch.ones(())})), "is (), but"),
    "whole numbers": (
        tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)})),
        f"{NORM} in",
    ),
    "eight bits": (
        tensors(lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        "F8_E4M3; Picotron reads F16",
    ),
    "NaN": (tensors(lambda t: t[NORM].fill_(float("nan"))), "numbers that are not finite"),
    "infinity": (tensors(lambda t: t[HEAD][3].fill_(float("-inf"))), "numbers that are not finite"),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_weights_that_are_wrong_are_named(whole, tmp_path, mistake):
    from picotron_core.errors import ConfigError
    from picotron_core.model.llama import Llama
    from picotron_core.model.pretrained import load_architecture, load_weights
    from picotron_core.ops import Ops

    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    nothing: Any = None
    with torch.device("meta"):
        model = Llama(load_architecture(folder), Ops(**dict.fromkeys(Ops.__slots__, nothing)))
    model.to_empty(device="cpu")
    load_weights(model, folder)
    change, wanted = WEIGHTS[mistake]
    change(folder)
    with pytest.raises(ConfigError) as error:
        load_weights(model, folder)
    said = str(error.value)
    assert wanted in said
    assert "\n" not in said


def test_a_config_with_a_byte_order_mark_is_read(whole, tmp_path):
    from picotron_core.model.pretrained import load_architecture

    shutil.copytree(whole, tmp_path / "model")
    written(json.dumps(CONFIG).encode("utf-8-sig"))(tmp_path / "model")
    assert load_architecture(tmp_path / "model") == load_architecture(whole)


def test_links_of_the_hubs_cache_are_read(whole, tmp_path):
    """A snapshot is links to files that are named by their content."""
    from picotron_core.model.pretrained import load_architecture

    (tmp_path / "model").mkdir()
    for path in whole.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    assert load_architecture(tmp_path / "model") == load_architecture(whole)
