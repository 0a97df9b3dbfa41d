"""`picotron generate` writes what transformers writes, from runs, folders and exports."""

from __future__ import annotations

import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "the quick"


def continued(model, ids, count=12, **changes):
    """The ids of transformers' greedy text."""
    ids = torch.tensor([ids])
    # Without a mask transformers ignores the tokens of the prompt that are padding by their id.
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **changes}
    return model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, **options)[0]


def greedy(folder, prompt=PROMPT, count=12, **changes):
    """What transformers writes: the ids with those of the prompt, and the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = continued(model, tokenizer(prompt).input_ids, count, **changes).tolist()
    return found, tokenizer.decode(found, skip_special_tokens=True)


def write(picotron, folder, *more, prompt=PROMPT, count=12):
    code, out, err = picotron(
        *("generate", str(folder), "--prompt", prompt, "--max-new-tokens", str(count)),
        *("--temperature", "0", "--device", "cpu", *more),
    )
    assert code == 0, err
    return out.removesuffix("\n")


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        content.pop(key, None)
        if value is not ...:
            content[key] = value
    path.write_text(json.dumps(content))


ENDS_ITSELF = ("mistral", "bert", "t5")  # transformers' prompt would end the document


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("prompt", [PROMPT, "caf\u00e9 \u732b"])
def test_a_model_folder_continues_a_text_as_in_transformers(picotron, tmp_path, family, prompt):
    tokenizer = families.save_tokenizer(family, tmp_path)
    families.save_model(tmp_path, len(tokenizer) + 7)  # a vocabulary that is filled up
    edit(tmp_path / "generation_config.json", eos_token_id=tokenizer.eos_token_id)
    if family in ENDS_ITSELF:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        found = continued(model, tokenizer(prompt).input_ids[:-1])
        wanted = tokenizer.decode(found, skip_special_tokens=True)
    else:
        _, wanted = greedy(tmp_path, prompt)
    assert write(picotron, tmp_path, prompt=prompt) == wanted


@pytest.fixture
def folder(tmp_path):
    """A model folder whose greedy text ends at none of its tokens by itself."""
    families.save_tokenizer("llama3", tmp_path / "base")
    families.save_model(tmp_path / "base", 320)
    return tmp_path / "base"


CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.mark.parametrize(
    "named",
    [
        {CONFIG: "list"},
        {GENERATION: "list"},
        {CONFIG: "int"},
        {GENERATION: "int"},
        {CONFIG: "other", GENERATION: "int"},
        {CONFIG: "int", GENERATION: "other"},
        {CONFIG: "list", GENERATION: ...},
        {CONFIG: ..., GENERATION: "int"},
    ],
    ids=str,
)
def test_every_end_of_both_configs_ends_a_text(picotron, folder, named):
    ids, _ = greedy(folder, count=10)
    end = ids[-4]
    before = ids[: ids.index(end, len(ids) - 10)]
    values = {"list": [318, end, 319], "int": end, "other": 319, ...: ...}
    for name in (CONFIG, GENERATION):
        edit(folder / name, eos_token_id=values[named.get(name, ...)])
    wanted = AutoTokenizer.from_pretrained(folder).decode(before, skip_special_tokens=True)
    assert write(picotron, folder) == wanted


def test_no_end_but_the_tokenizers_where_no_file_names_one(picotron, folder):
    ids, text = greedy(folder)
    for name in (CONFIG, GENERATION):
        edit(folder / name, eos_token_id=None)
    assert write(picotron, folder) == text
    edit(folder / GENERATION, eos_token_id=[])
    assert write(picotron, folder) == text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edit(folder / "tokenizer_config.json", eos_token=tokenizer.convert_ids_to_tokens(ids[-1]))
    assert len(write(picotron, folder)) < len(text)


@pytest.mark.parametrize("eos", ["</s>", [1, "2"], {"a": 1}, 1.5, True, -2, 2**70])
@pytest.mark.parametrize("name", [CONFIG, GENERATION])
def test_ends_that_are_no_ids_are_named(picotron, folder, eos, name):
    edit(folder / name, eos_token_id=eos)
    code, out, err = picotron("generate", str(folder), "--prompt", "a", "--device", "cpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "eos_token_id" in err


def test_the_dtype_is_that_of_the_folder(picotron, folder):
    tensors = load_file(folder / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / CONFIG, dtype="bfloat16")
    _, text = greedy(folder, count=4)
    assert write(picotron, folder, count=4) == text


TRAIN = (
    *("--data.seq_len", "16", "--data.val_fraction", "0.2", "--train.micro_batch", "4"),
    *("--train.steps", "3", "--train.warmup_steps", "1", "--train.eval_samples", "4"),
    *("--train.lr", "0.01", "--train.dtype", "float32", "--run.device", "cpu", "--name", "run"),
)


def train(picotron, tmp_path, cache_dir, *more):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(families.text_of(3, 150)))
    data = ("--data", str(text), "--data.cache_dir", str(cache_dir))
    return picotron("train", *data, *TRAIN, *more)


NAMED = {  # eos_token_id of the base's config.json and generation_config.json: "7", EOS, both
    "llama2": ([7], ...),
    "mistral": (..., ["eos", 7]),
    "gpt2": (["eos", 7], ["eos"]),
    "bert": (None, 7),
}


@pytest.mark.parametrize("family", NAMED)
def test_a_run_its_export_and_transformers_continue_alike(picotron, tmp_path, cache_dir, family):
    base = tmp_path / "base"
    tokenizer = families.save_tokenizer(family, base)
    families.save_model(base, len(tokenizer))
    for name, ids in zip((CONFIG, GENERATION), NAMED[family], strict=True):
        if isinstance(ids, list):
            ids = [tokenizer.eos_token_id if token == "eos" else token for token in ids]
        edit(base / name, eos_token_id=ids)
    code, out, err = train(picotron, tmp_path, cache_dir, "--model.path", str(base))
    assert code == 0, err
    begin = {"llama2": "BOS <s>", "mistral": "BOS <s>", "gpt2": "no BOS", "bert": "BOS [CLS]"}
    policy = f"tokens {begin[family]} before each document, EOS {tokenizer.eos_token} after it"
    assert policy in out
    assert picotron("export", "runs/run", "out")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    named = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (named if isinstance(named, list) else [named])
    # transformers reads one of the two files alone; it keeps the end that it met in its ids.
    ends = [7, tokenizer.eos_token_id]
    ids, _ = greedy(tmp_path / "out", count=40, eos_token_id=ends)
    ids = ids[:-1] if ids[-1] in ends else ids
    wanted = tokenizer.decode(ids, skip_special_tokens=True)
    assert write(picotron, "runs/run", count=40) == wanted
    assert write(picotron, "out", count=40) == wanted


@pytest.mark.parametrize("tied", [True, False])
def test_a_tokenizer_that_grew_is_refused_or_given_rows(picotron, tmp_path, cache_dir, tied):
    base = tmp_path / "base"
    tokenizer = families.save_tokenizer("llama3", base)
    old = families.save_model(base, len(tokenizer), tie_word_embeddings=tied)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(base)
    wish = ("--model.path", str(base))
    code, _, err = train(picotron, tmp_path, cache_dir, *wish)
    assert (code, err.count("\n")) == (2, 1)
    assert "--model.resize_embeddings true" in err
    tiny = ("--train.lr", "1e-12", "--model.resize_embeddings", "true")  # nothing moves
    code, _, err = train(picotron, tmp_path, cache_dir, *wish, *tiny)
    assert code == 0, err
    assert picotron("export", "runs/run", "out")[0] == 0
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert new.config.vocab_size == len(tokenizer) == len(old.model.embed_tokens.weight) + 3
    old.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # transformers draws around the mean, with a deviation that is not to be seen.
        torch.testing.assert_close(
            new.state_dict()[name], old.state_dict()[name], rtol=0, atol=1e-4
        )
    code, _, err = picotron("train", "--resume", "runs/run", "--train.steps", "5")
    assert code == 0, err
    _, text = greedy(tmp_path / "out", "<|user|> the")
    assert write(picotron, "out", prompt="<|user|> the") == text


def test_minus_one_is_no_end(picotron, tmp_path, cache_dir):
    tokenizer = families.save_tokenizer("llama3", tmp_path / "base")
    families.save_model(tmp_path / "base", 320, eos_token_id=-1, pad_token_id=-1)
    edit(tmp_path / "base" / GENERATION, eos_token_id=[-1])
    code, _, err = train(picotron, tmp_path, cache_dir, "--model.path", str(tmp_path / "base"))
    assert code == 0, err
    assert picotron("export", "runs/run", "out")[0] == 0
    for name in (CONFIG, GENERATION):
        ends = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        assert tokenizer.eos_token_id in ends


def test_another_tokenizer_of_fewer_tokens_has_its_own_ends(picotron, tmp_path, cache_dir):
    """An id that config.json calls an end is an ordinary token of it."""
    families.save_tokenizer("llama2", tmp_path / "base")
    families.save_model(tmp_path / "base", 430, eos_token_id=[2, *range(100, 320)])
    families.save_tokenizer("llama3", tmp_path / "other")
    wish = ("--model.path", str(tmp_path / "base"), "--data.tokenizer", str(tmp_path / "other"))
    code, _, err = train(picotron, tmp_path, cache_dir, *wish, "--train.steps", "30")
    assert code == 0, err
    assert len(write(picotron, "runs/run")) > len(PROMPT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, but it must be >= 1"),
        (["--max-new-tokens", "-3"], "--max-new-tokens is -3"),
        (["--max-new-tokens", "99999999999999999999"], "at most 63 new tokens"),
        (["--max-new-tokens", "64"], "max_position_embeddings = 64"),
        (["--prompt", "fox " * 70], "--prompt has 72 tokens, more than"),
        (["--prompt", "fox " * 70, "--max-new-tokens", "1"], "--prompt has 72 tokens, more than"),
        (["--temperature", "-0.5"], "--temperature is -0.5"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "inf"], "--temperature is inf"),
        (["--top-p", "0"], "--top-p is 0.0"),
        (["--top-p", "1.0001"], "--top-p is 1.0001"),
        (["--top-p", "nan"], "--top-p is nan"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(2**63)], "--seed is 9223372036854775808"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8: after 3 characters comes the byte"),
        (["--prompt", "\udcff"], "the byte 0xff"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_anything_is_printed(picotron, folder, words, said):
    given = words if "--prompt" in words else ["--prompt", "a", *words]
    code, out, err = picotron("generate", str(folder), "--device", "cpu", *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "1e-300"],
        ["--temperature", "1e300"],
        ["--top-k", "99999999999999999999"],
        ["--top-p", "1e-300"],
        ["--prompt", ""],
        ["--max-new-tokens", "63"],
    ],
)
def test_extremes_that_can_be_meant_write_a_text(picotron, folder, words):
    given = words if "--prompt" in words else ["--prompt", "a", *words]
    code, out, err = picotron("generate", str(folder), "--device", "cpu", *given)
    assert (code, err) == (0, "")
    assert out.startswith("" if "--prompt" in words else "a")


def remove(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def only_sentencepiece(folder):
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x07")


def only_slow(folder):
    remove("tokenizer.json")(folder)
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


BROKEN = {
    "no file": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer.json"),
    "only the config": (remove("tokenizer.json"), "has no tokenizer.json"),
    "sentencepiece": (only_sentencepiece, "no tokenizer.json, only tokenizer.model"),
    "slow": (only_slow, "no tokenizer.json, only vocab.json"),
    "cut": (
        lambda folder: (folder / "tokenizer.json").write_bytes(
            (folder / "tokenizer.json").read_bytes()[:900]
        ),
        "tokenizer.json is damaged",
    ),
    "not UTF-8": (
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe{}"),
        "tokenizer.json is not UTF-8",
    ),
    "other JSON": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged"),
    "empty": (lambda folder: (folder / "tokenizer.json").write_text(""), "damaged"),
    "config cut": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"eos'),
        "tokenizer_config.json is not JSON",
    ),
    "config of another kind": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json holds no JSON object",
    ),
    "no config": (remove("tokenizer_config.json"), "has no EOS token"),
    "no EOS": (
        lambda folder: edit(folder / "tokenizer_config.json", eos_token=...),
        "has no EOS token",
    ),
}


def test_an_unknown_word_without_a_token_for_it_is_one_line(picotron, tmp_path):
    families.save_tokenizer("words", tmp_path)
    families.save_model(tmp_path, 40)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "nothing"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    edit(tmp_path / "tokenizer_config.json", unk_token=...)
    code, out, err = picotron("generate", str(tmp_path), "--prompt", "zebra", "--device", "cpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot encode the text" in err


def test_a_folder_without_config_json_is_named_as_a_model(picotron, folder):
    (folder / CONFIG).unlink()
    code, _, err = picotron("generate", str(folder), "--prompt", "a", "--device", "cpu")
    assert code == 2
    assert "holds no config.json" in err


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN)
def test_a_folder_without_a_usable_tokenizer_is_a_whole_sentence(
    picotron, folder, tmp_path, cache_dir, damage, said
):
    damage(folder)
    code, out, err = train(picotron, tmp_path, cache_dir, "--model.path", str(folder))
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err
    assert "--data.tokenizer" in err
    assert "tokenizer" in err
    assert err.rstrip().endswith(".")
    code, out, err = picotron("generate", str(folder), "--prompt", "a", "--device", "cpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "--data.tokenizer" not in err  # which `generate` does not take
