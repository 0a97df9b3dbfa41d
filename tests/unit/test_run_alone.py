"""A run's folder stands alone: it can be moved, and used without its base model and its data. What
is missing or damaged in it is one line that names the file.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import forge
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from picotron_core import cli

SHORT = (
    *("--data.seq_len", "16", "--train.micro_batch", "2", "--train.warmup_steps", "1"),
    *("--train.eval_samples", "4", "--train.dtype", "float32", "--run.device", "cpu"),
    *("--train.steps", "2", "--checkpoint.every", "2"),
)
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven")
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"


def picotron(cwd: Path, *arguments: str) -> tuple[int, str, str]:
    """`picotron ARGUMENTS` in a folder -> exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["picotron", *arguments])
        patch.chdir(cwd)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0), out.getvalue(), err.getvalue()


def save_base(folder: Path, *, seed: int, hidden_size: int = 32) -> None:
    """A model folder with all that such a folder may say of the model's use."""
    text = [" ".join(WORDS[(i * j + seed) % len(WORDS)] for j in range(9)) for i in range(99)]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    fast = Fast(
        tokenizer_object=backend,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>"],
    )
    fast.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "tools"}
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=5000.0,
        bos_token_id=1,
        eos_token_id=[2, 5],
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[2, 7], pad_token_id=0
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a base model, a text, its token cache, and a run that began from the base."""
    project = tmp_path_factory.mktemp("made") / "project"
    project.mkdir()
    save_base(project / "base", seed=0)
    (project / "text.txt").write_text(
        "\n".join(" ".join(WORDS[(i * i + j) % len(WORDS)] for j in range(12)) for i in range(400))
    )
    paths = ("--model.path", "base", "--data", "text.txt", "--data.cache_dir", "cache")
    code, _, err = picotron(project, "train", *SHORT, *paths, "--name", "fine")
    assert code == 0, err
    return project


@pytest.fixture(scope="module")
def wanted(made, tmp_path_factory):
    """What the run gives where nothing has changed."""
    project = shutil.copytree(made, tmp_path_factory.mktemp("wanted") / "project")
    return results(project, "runs/fine", project / "runs" / "fine", tmp_path_factory.mktemp("out"))


@pytest.fixture
def project(made, tmp_path):
    """Where the run was made, as it was then: its config names these very paths."""
    kept = made.with_name("kept")
    shutil.copytree(made, kept, symlinks=True)
    yield made
    shutil.rmtree(made, ignore_errors=True)
    kept.rename(made)


def results(cwd, given, run, out):
    """The text that is generated, the exported files, and the losses of a resumed run."""
    prompt = ("--prompt", "the quick", "--max-new-tokens", "6", "--temperature", "0")
    code, text, err = picotron(cwd, "generate", str(given), *prompt)
    assert code == 0, err
    code, _, err = picotron(cwd, "export", str(given), str(out / "model"))
    assert code == 0, err
    files = {
        path.relative_to(out / "model").as_posix(): path.read_bytes()
        for path in (out / "model").rglob("*")
        if path.is_file()
    }
    code, _, err = picotron(cwd, "train", "--resume", str(given), "--train.steps", "3")
    assert code == 0, err
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["run"]["dir"], config["run"]["name"]) == (str(run.parent), run.name)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return text, files, [line["loss"] for line in lines if "loss" in line]


def moved(project, tmp_path):
    target = (project / "runs" / "fine").rename(tmp_path / "elsewhere")
    return tmp_path, "elsewhere", target


def copied_under_another_name(project, tmp_path):
    shutil.copytree(project / "runs" / "fine", tmp_path / "a" / "b c")
    shutil.rmtree(project / "runs" / "fine")
    return tmp_path / "a", "b c/", tmp_path / "a" / "b c"


def without_its_base(project, tmp_path):
    shutil.rmtree(project / "base")
    return project, "runs/fine", project / "runs" / "fine"


def with_a_file_as_base(project, tmp_path):
    shutil.rmtree(project / "base")
    (project / "base").write_text("not a folder")
    return project / "runs", "fine", project / "runs" / "fine"


def with_another_base_in_its_place(project, tmp_path):
    shutil.rmtree(project / "base")
    save_base(project / "base", seed=5)
    return tmp_path, project / "runs/fine", project / "runs" / "fine"


def with_a_wider_base_in_its_place(project, tmp_path):
    shutil.rmtree(project / "base")
    save_base(project / "base", seed=3, hidden_size=64)
    return project, "./runs/../runs/fine", project / "runs" / "fine"


def without_its_text(project, tmp_path):
    (project / "text.txt").unlink()
    return tmp_path, project / "runs/fine", project / "runs" / "fine"


def without_its_cache(project, tmp_path):
    shutil.rmtree(project / "cache")
    return tmp_path, project / "runs/fine", project / "runs" / "fine"


def without_base_and_text_from_the_root(project, tmp_path):
    shutil.rmtree(project / "base")
    (project / "text.txt").unlink()
    run = project / "runs" / "fine"
    return Path("/"), os.path.relpath(run, "/"), run


def from_within_the_folder(project, tmp_path):
    shutil.rmtree(project / "base")
    return project / "runs" / "fine", ".", project / "runs" / "fine"


def from_within_its_checkpoints(project, tmp_path):
    shutil.rmtree(project / "base")
    run = project / "runs" / "fine"
    return run / "checkpoints", "step-00000002", run


def by_a_link_to_the_run(project, tmp_path):
    (tmp_path / "latest").symlink_to(project / "runs" / "fine")
    return tmp_path, "latest", project / "runs" / "fine"


def by_a_link_to_a_checkpoint(project, tmp_path):
    run = project / "runs" / "fine"
    (tmp_path / "newest").symlink_to(run / "checkpoints" / "step-00000002")
    return tmp_path, "newest/", run


@pytest.mark.parametrize(
    "place",
    [
        *(moved, copied_under_another_name, without_its_base, with_a_file_as_base),
        *(with_another_base_in_its_place, with_a_wider_base_in_its_place, without_its_text),
        *(without_its_cache, without_base_and_text_from_the_root, from_within_the_folder),
        *(from_within_its_checkpoints, by_a_link_to_the_run, by_a_link_to_a_checkpoint),
    ],
)
def test_a_run_does_the_same_anywhere(place, project, wanted, tmp_path):
    cwd, given, run = place(project, tmp_path)
    text, files, losses = results(cwd, given, run, tmp_path)
    assert text == wanted[0]
    assert files == wanted[1]
    assert losses == wanted[2]


def test_paths_are_written_down_absolute(made):
    config = tomllib.loads((made / "runs" / "fine" / "config.toml").read_text())
    assert config["model"]["path"] == str(made / "base")
    assert config["data"]["paths"] == [str(made / "text.txt")]
    assert config["data"]["cache_dir"] == str(made / "cache")
    assert config["run"]["dir"] == str(made / "runs")


def test_an_export_says_of_use_what_the_base_said(made, wanted):
    base, files = made / "base", wanted[1]
    carried = [
        *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    ]
    for name in carried:
        assert files[name] == (base / name).read_bytes(), name
    theirs, ours = json.loads((base / "config.json").read_text()), json.loads(files["config.json"])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert ours[key] == theirs[key], key


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def swap_words(path):
    """Still a tokenizer: two entries of its vocabulary have changed places."""
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))


def set_value(key, value):
    def change(path):
        content = json.loads(path.read_text())
        content[key] = value
        path.write_text(json.dumps(content))

    return change


def make_fifo(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_link(path):
    """To a file with the very same content."""
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def make_folder_link(path):
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def replace_by(text):
    return lambda path: path.write_bytes(text)


def append(text):
    return lambda path: path.write_bytes(path.read_bytes() + text)


def of_another_run(path):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<|pad|>", "<|start|>", "<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))


DAMAGE = {
    "no tokenizer": ("tokenizer", shutil.rmtree),
    "a tokenizer that is a link": ("tokenizer", make_folder_link),
    "the tokenizer of another run": ("tokenizer", of_another_run),
    "tokenizer.json is gone": ("tokenizer/tokenizer.json", Path.unlink),
    "tokenizer.json is cut": ("tokenizer/tokenizer.json", cut),
    "tokenizer.json has a flipped bit": ("tokenizer/tokenizer.json", flip),
    "tokenizer.json has two words swapped": ("tokenizer/tokenizer.json", swap_words),
    "tokenizer.json is empty": ("tokenizer/tokenizer.json", replace_by(b"")),
    "tokenizer.json is a pipe": ("tokenizer/tokenizer.json", make_fifo),
    "tokenizer.json is a link": ("tokenizer/tokenizer.json", make_link),
    "the chat template has one more line": ("tokenizer/chat_template.jinja", append(b"\nx")),
    "a second template is gone": (
        "tokenizer/additional_chat_templates/tool_use.jinja",
        Path.unlink,
    ),
    "the tokenizer's config is a folder": ("tokenizer/tokenizer_config.json", make_folder),
    "the model is wider": ("model/config.json", set_value("hidden_size", 64)),
    "the model's rope is another": (
        "model/config.json",
        set_value("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    ),
    "the model's config holds no object": ("model/config.json", replace_by(b"5")),
    "the model's config is not UTF-8": ("model/config.json", replace_by(b"\xff\xfe{}")),
    "no model": ("model", shutil.rmtree),
    "the generation config is cut": ("model/generation_config.json", cut),
    "the generation config ends elsewhere": (
        "model/generation_config.json",
        set_value("eos_token_id", 3),
    ),
    "config.toml is gone": ("config.toml", Path.unlink),
    "config.toml is cut": ("config.toml", cut),
    "config.toml is not UTF-8": ("config.toml", append(b"\xff\xff")),
    "config.toml is a folder": ("config.toml", make_folder),
    "config.toml is a pipe": ("config.toml", make_fifo),
    "config.toml is a link": ("config.toml", make_link),
    "config.toml has an unknown key": ("config.toml", append(b"\n[trane]\nsteps = 3\n")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_that_names_the_file(damage, made, tmp_path):
    name, change = DAMAGE[damage]
    run = shutil.copytree(made / "runs" / "fine", tmp_path / "run")
    change(run / name)
    before = contents(run)
    for command in (
        ("generate", "run", "--prompt", "a", "--max-new-tokens", "2"),
        ("export", "run", "out"),
        ("train", "--resume", "run", "--train.steps", "3"),
    ):
        code, _, err = picotron(tmp_path, *command)
        last = err.splitlines()[-1]
        assert code in (1, 2), err
        assert last.startswith("error: ")
        assert err.count("error: ") == 1
        assert Path(name).name in last or "run is not a run" in last, last
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    if name.startswith(("model", "tokenizer")):
        code, out, _ = picotron(tmp_path, "checkpoint", "verify", "run")
        assert code == 1
        assert "whole" not in out
    assert contents(run) == before


def contents(run):
    return {
        path.relative_to(run): path.read_bytes() if path.is_file() else None
        for path in run.rglob("*")
        if path.name != "lock" and path.suffix != ".log"
    }


def test_a_file_that_the_run_did_not_write_is_not_used(made, caplog, tmp_path):
    run = shutil.copytree(made / "runs" / "fine", tmp_path / "run")
    (run / "tokenizer" / "chat_template.json").write_text('{"chat_template": "x"}')
    code, _, err = picotron(tmp_path, "export", "run", "out")
    assert code == 0, err
    assert "chat_template.json is not a file that the run wrote: it is not used" in caplog.text
    assert not (tmp_path / "out" / "chat_template.json").exists()


EDITS = {
    "hidden_size": ("hidden_size = 256", "hidden_size = 512"),
    "rope_theta": ("rope_theta = 10000.0", "rope_theta = 20000.0"),
    "num_hidden_layers": ("num_hidden_layers = 6", "num_hidden_layers = 7"),
    "max_position_embeddings": ("max_position_embeddings = 2048", "max_position_embeddings = 64"),
    "tie_word_embeddings": ("tie_word_embeddings = true", "tie_word_embeddings = false"),
    "rms_norm_eps": ("rms_norm_eps = 1e-05", "rms_norm_eps = 1e-06"),
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_model_is_refused(key, made, tmp_path):
    run = shutil.copytree(made / "runs" / "fine", tmp_path / "run")
    text = (run / "config.toml").read_text()
    before, after = EDITS[key]
    assert before in text
    (run / "config.toml").write_text(text.replace(before, after))
    for command in (
        ("generate", "run"),
        ("export", "run", "out"),
        ("train", "--resume", "run", "--train.steps", "3"),
    ):
        code, _, err = picotron(tmp_path, *command)
        assert code == 2, err
        assert f"error: model.{key} is " in err


def test_an_edited_training_is_the_users_wish(made, tmp_path):
    run = shutil.copytree(made / "runs" / "fine", tmp_path / "run")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("steps = 2\n", "steps = 4\n", 1))
    code, _, err = picotron(tmp_path, "train", "--resume", "run")
    assert code == 0, err
    assert (run / "checkpoints" / "step-00000004").is_dir()


def test_a_resume_without_text_and_cache_names_both(project, tmp_path):
    run = (project / "runs" / "fine").rename(tmp_path / "run")
    text = (project / "text.txt").rename(tmp_path / "moved.txt")
    cache = (project / "cache").rename(tmp_path / "cache")
    resume = ("train", "--resume", "run", "--train.steps", "3")
    code, _, err = picotron(tmp_path, *resume)
    assert code == 2
    assert f"data.paths names {project / 'text.txt'}" in err.splitlines()[-1]
    assert "--data PATH" in err
    assert "--data.cache_dir" in err
    # Either is enough.
    shutil.copytree(run, tmp_path / "second")
    code, _, err = picotron(tmp_path, *resume, "--data.cache_dir", "cache")
    assert code == 0, err
    shutil.rmtree(cache)
    code, _, err = picotron(
        tmp_path, "train", "--resume", "second", "--train.steps", "3", "--data", "moved.txt"
    )
    assert code == 0, err
    config = tomllib.loads((tmp_path / "second" / "config.toml").read_text())
    assert config["data"]["paths"] == [str(text)]


def test_a_missing_model_is_named_also_where_the_base_is_gone(project):
    shutil.rmtree(project / "base")
    shutil.rmtree(project / "runs" / "fine" / "model")
    code, _, err = picotron(project, "train", "--resume", "runs/fine", "--train.steps", "3")
    assert code == 1
    assert "fine/model/config.json is damaged: it is missing" in err.splitlines()[-1]


def test_tokens_of_another_text_under_the_name_of_those_of_the_run(project, tmp_path):
    """The text is gone, and its folder in the cache was swapped with another's."""
    (project / "text.txt").rename(tmp_path / "text.txt")
    (project / "other.txt").write_text("a fox jumps over the dog\n" * 500)
    paths = ("--model.path", "base", "--data", "other.txt", "--data.cache_dir", "cache")
    code, _, err = picotron(project, "train", *SHORT, *paths, "--name", "other")
    assert code == 0, err
    cached, other = (
        project / "cache" / forge.manifest_of(checkpoint)["facts"]["data"]
        for run in ("fine", "other")
        for checkpoint in (project / "runs" / run / "checkpoints").glob("step-00000002")
    )
    shutil.rmtree(cached)
    other.rename(cached)
    code, _, err = picotron(project, "train", "--resume", "runs/fine", "--train.steps", "3")
    assert code in (1, 2)
    assert "is of other tokens" in err.splitlines()[-1]


def test_the_same_command_again_goes_on_without_base_tokenizer_and_text(project, caplog):
    """As a scheduler starts it, with its relative paths; nothing lies there any more."""
    paths = ("--model.path", "base", "--data.tokenizer", "words", "--data", "text.txt")
    shutil.copytree(project / "base", project / "words")
    command = ("train", *SHORT, *paths, "--data.cache_dir", "cache", "--run.resume", "true")
    code, _, err = picotron(project, *command, "--name", "again")
    assert code == 0, err
    for name in ("base", "words"):
        shutil.rmtree(project / name)
    (project / "text.txt").unlink()
    code, _, err = picotron(project, *command, "--name", "again", "--train.steps", "3")
    assert code == 0, err
    assert "resumed from" in caplog.text
    assert "has no effect" not in caplog.text


@pytest.mark.parametrize("given", ["nowhere.txt", "other.txt"])
def test_no_cache_stands_in_for_other_text(given, project, tmp_path):
    (project / "text.txt").rename(project / "gone.txt")
    (tmp_path / "other.txt").write_text("some other words\n" * 500)
    run = str(project / "runs" / "fine")
    code, _, err = picotron(
        tmp_path, "train", "--resume", run, "--train.steps", "3", "--data", given
    )
    assert code in (1, 2)
    assert re.search("nowhere.txt|trained on other data", err.splitlines()[-1])


def test_another_base_on_the_command_line_has_no_effect(project, wanted, caplog, tmp_path):
    save_base(tmp_path / "other", seed=9)
    run = project / "runs" / "fine"
    more = ("--train.steps", "3", "--model.path", "other")
    code, _, err = picotron(tmp_path, "train", "--resume", str(run), *more)
    assert code == 0, err
    assert "model.path = 'other' has no effect" in caplog.text
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["loss"] for line in lines if "loss" in line] == wanted[2]
    assert tomllib.loads((run / "config.toml").read_text())["model"]["path"].endswith("base")


def test_a_run_of_an_earlier_version_is_read_and_brought_up_to_date(project, wanted, tmp_path):
    """It has no record of its model, and needs its base until it is resumed once."""
    run = project / "runs" / "fine"
    shutil.rmtree(run / "model")
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (run / "tokenizer" / name).unlink()
    shutil.rmtree(run / "tokenizer" / "additional_chat_templates")
    checkpoint = run / "checkpoints" / "step-00000002"
    manifest = forge.manifest_of(checkpoint)
    for key in ("files", "ends", "dtype"):
        del manifest["facts"][key]
    forge.write_manifest(checkpoint, manifest)
    text, files, losses = results(project, "runs/fine", run, tmp_path)
    assert text == wanted[0]
    assert losses == wanted[2]
    assert files["model.safetensors"] == wanted[1]["model.safetensors"]
    shutil.rmtree(project / "base")
    code, _, err = picotron(tmp_path, "export", str(run), "after")
    assert code == 0, err
    ours = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert ours.eos_token == "<|end|>"
    assert load_file(tmp_path / "after" / "model.safetensors")


FORMS = {
    "its folder": ("/", "{run}"),
    "with a slash": ("/", "{run}/"),
    "relative": ("{run}/..", "./fine"),
    "its name alone": ("{run}/..", "fine"),
    "from within": ("{run}", "."),
    "from within a checkpoint": ("{run}/checkpoints/step-00000002", "../.."),
    "by a link": ("{links}", "latest"),
    "a checkpoint by a link to the run": ("{links}", "latest/checkpoints/step-00000002/"),
    "in a folder called checkpoints": ("{links}", "checkpoints/copy"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_command_takes_every_form_of_path(form, made, tmp_path):
    run = made / "runs" / "fine"
    (tmp_path / "latest").symlink_to(run)
    shutil.copytree(run, tmp_path / "checkpoints" / "copy")
    cwd, given = (text.format(run=run, links=tmp_path) for text in FORMS[form])
    for command in (("checkpoint", "list"), ("checkpoint", "inspect"), ("slurm", "csv")):
        code, out, err = picotron(Path(cwd), *command, given)
        assert code == 0, err
        assert "2" in out
    code, _, err = picotron(Path(cwd), "trace", given)
    assert code == 2
    assert "has no trace" in err
    code, _, err = picotron(Path(cwd), "generate", given, "--max-new-tokens", "1")
    assert code == 0, err
