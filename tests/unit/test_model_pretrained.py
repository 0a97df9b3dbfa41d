"""Weights in Hugging Face's layout are read exactly; what does not fit is named, not guessed."""

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from picotron_core.errors import ConfigError
from picotron_core.model.llama import Llama
from picotron_core.model.pretrained import load_architecture, load_weights
from picotron_core.ops import Ops

KERNELS = {
    "attention": ("attention", "attention"),
    "norm": ("norm", "rms_norm"),
    "rope": ("rope", "rope"),
    "swiglu": ("swiglu", "swiglu"),
    "loss": ("loss", "loss"),
}
IDS = torch.arange(24).view(2, 12) * 4


def llama(folder):
    kernels = {
        op: getattr(import_module(f"picotron_backends.naive_math.{module}"), name)
        for op, (module, name) in KERNELS.items()
    }
    return Llama(load_architecture(folder), Ops(**kernels, optimizer=None, comm=None))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(tied?, sharded?, dtype) -> (folder written by transformers, its model)."""
    made = {}

    def save(*, tied=False, shard="5GB", dtype=torch.float32):
        key = (tied, shard, dtype)
        if key not in made:
            torch.manual_seed(1)
            config = LlamaConfig(
                vocab_size=97,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                initializer_range=0.1,
                tie_word_embeddings=tied,
            )
            model = LlamaForCausalLM(config).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:  # born as one, in ours too
                        parameter.uniform_(0.5, 1.5)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder, max_shard_size=shard)
            made[key] = (folder, model)
        return made[key]

    return save


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of an untied, unsharded one, to damage."""
    shutil.copytree(saved()[0], tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(folder, *words, model=None):
    with pytest.raises(ConfigError) as error:
        load_weights(model or llama(folder), folder)
    assert "\n" not in str(error.value)
    for word in (folder.name, *words):
        assert word in str(error.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_what_transformers_saved_computes_the_same(saved, tied, shard):
    folder, theirs = saved(tied=tied, shard=shard)
    assert (folder / "model.safetensors").exists() == (shard == "5GB")
    ours = llama(folder)
    load_weights(ours, folder)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_checkpoint_is_upcast_exactly(saved, dtype):
    folder, theirs = saved(dtype=dtype)
    ours = llama(folder)
    load_weights(ours, folder)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, theirs.get_parameter(name).float()), name
    load_weights(ours.to(dtype), folder)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(folder):
    model = llama(folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(folder, "lack", "model.layers.1.mlp.up_proj.weight", model=model)
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 63)}))
    assert_refused(folder, "mlp.up_proj.weight", "(96, 63)", "(96, 64)", model=model)
    whole = torch.zeros(96, 64, dtype=torch.int32)
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": whole}))
    assert_refused(folder, "mlp.up_proj.weight", "I32", model=model)
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": whole.float()}))
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert_refused(folder, "model.layers.0.self_attn.q_proj.bias", model=model)

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_rotary_frequencies_of_old_checkpoints_are_no_surprise(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    load_weights(llama(folder), folder)


def test_an_untied_model_needs_its_head(folder):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(folder, "lack", "lm_head.weight")


def test_a_tied_head_in_the_file_must_be_the_embedding(saved, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(saved(tied=True)[0], folder)

    def add_head(tensors, scale):
        tensors["lm_head.weight"] = scale * tensors["model.embed_tokens.weight"]

    rewrite(folder, partial(add_head, scale=1.0))
    load_weights(llama(folder), folder)
    rewrite(folder, partial(add_head, scale=1.5))
    assert_refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_damaged_or_foreign_files_are_one_line_errors(saved, folder, tmp_path):
    weights = folder / "model.safetensors"
    model = llama(folder)
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(folder, "model.safetensors", "cannot be read", model=model)
    weights.rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pickled weights (.bin), which can run code", model=model)

    sharded = tmp_path / "sharded"
    shutil.copytree(saved(shard="60KB")[0], sharded)
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "outside.safetensors")
    assert_refused(sharded, shard.name, model=model)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../outside.safetensors"))
    assert_refused(sharded, "../outside.safetensors", model=model)

    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        load_architecture(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_architecture(folder)
    with pytest.raises(ConfigError, match="No model folder"):
        load_architecture(tmp_path / "nowhere")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a snapshot of one repository, `team/tiny`, takes."""

    def __init__(self, folder, asked, *arguments):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        files = sorted(file.name for file in self.folder.iterdir())
        sizes = [(name, (self.folder / name).stat().st_size) for name in files]
        if path.startswith("/api/models/team/tiny/tree/"):
            rows = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes]
            self.answer(200, json.dumps(rows).encode())
        elif path.startswith("/api/models/team/tiny"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "team/tiny", "sha": "a" * 40, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())
        elif path.startswith("/team/tiny/resolve/") and path.rsplit("/", 1)[1] in files:
            name = path.rsplit("/", 1)[1]
            self.asked.add(name)
            self.answer(200, (self.folder / name).read_bytes())
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, body, headers=None):
        etag = f'"{hash(body) & 0xFFFFFFFF:08x}"'
        self.send_response(status)
        given = {"Content-Length": len(body), "ETag": etag, "X-Repo-Commit": "a" * 40}
        for key, value in (given | (headers or {})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


ASK_HUB = """
import sys
from picotron_core.errors import ConfigError
from picotron_core.model.model_folder import find_folder
from picotron_core.model.pretrained import load_architecture
for name in sys.argv[1:]:
    try:
        print(load_architecture(name).num_parameters)
        print(find_folder(name, ["*.safetensors", "*.json"]))
    except ConfigError as error:
        print("ConfigError", error)
"""


def ask_hub(endpoint, names, cache):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ASK_HUB, *names],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def test_a_hub_name_is_downloaded_but_never_its_pickles(folder, saved, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"code that would run")
    asked = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{server.server_port}"
            names = ["team/tiny", "team/huge"]
            count, snapshot, missing = ask_hub(endpoint, names, tmp_path / "cache")
        finally:
            server.shutdown()
            thread.join()
    assert int(count) == sum(parameter.numel() for parameter in saved()[1].parameters())
    assert {"config.json", "model.safetensors"} <= asked
    assert "pytorch_model.bin" not in asked
    model = llama(folder)
    load_weights(model, snapshot)
    assert torch.equal(model.lm_head.weight, saved()[1].lm_head.weight)
    assert missing.startswith("ConfigError 'team/huge' is neither a folder here nor")


def test_no_network_and_no_such_name_are_one_line_errors(tmp_path):
    names = ["team/tiny", "team//tiny", "not a name"]
    lines = ask_hub("http://127.0.0.1:9", names, tmp_path)
    for name, line in zip(names, lines, strict=True):
        assert line.startswith("ConfigError")
        assert repr(name) in line


@pytest.mark.parametrize("model_type", ["llama", "own"])
@pytest.mark.parametrize("name", ["AutoConfig", "AutoModel", "AutoModelForCausalLM"])
def test_a_model_of_its_own_code_is_refused(folder, name, model_type):
    path = folder / "config.json"
    described = json.loads(path.read_text())
    described |= {"model_type": model_type, "auto_map": {name: "modeling_own.Own"}}
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="runs no code from model folders") as caught:
        load_architecture(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
