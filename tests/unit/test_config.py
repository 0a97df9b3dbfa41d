"""Settings: precedence, types, and errors that name the file, the key and the right word."""

import re
from pathlib import Path
from typing import get_origin

import pytest

from picotron_core.config import Rule, load_settings, parse_backends
from picotron_core.errors import ConfigError
from picotron_core.schema import fields


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_command_line_beats_environment_beats_file_beats_default(tmp_path):
    path = toml(tmp_path, '[run]\ndevice = "cuda"\nlog_every = 3\n[data]\ncache_dir = "a"')
    env = {"PICOTRON_DEVICE": "auto", "PICOTRON_CACHE_DIR": "b"}
    config = load_settings(path, [("run.device", "cpu")], env=env).config
    assert (config.run.device, config.data.cache_dir, config.run.log_every) == ("cpu", "b", 3)
    assert config.train.clip == 1.0


def test_every_setting_can_be_given_on_the_command_line():
    """Each field takes the text of its own default, and nothing else changes."""
    default = load_settings(env={}).config
    for key, field in fields():
        if key in ("backends", "model.rope_scaling") or get_origin(field.annotation) is list:
            continue
        value = field.default
        config = load_settings(None, [(key, str(value))], env={}).config
        if not key.startswith("model.rope_scaling."):
            assert config == default, key
        else:
            assert config.model.rope_scaling is not None


def test_values_take_the_type_of_their_field():
    overrides = [("train.lr", "2e-4"), ("data.document_mask", "true"), ("train.steps", "7")]
    overrides += [("data.paths", "a"), ("data.paths", "b"), ("model.rope_scaling.factor", "2")]
    config = load_settings(None, overrides, env={}).config
    assert config.train.lr == 2e-4
    assert config.data.document_mask is True
    assert config.train.steps == 7
    assert config.data.paths == ["a", "b"]
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstpes = 3", "run.toml: unknown key 'train.stpes'. Did you mean 'train.steps'?"),
        ("[trian]\nsteps = 3", "unknown key 'trian'. Did you mean 'train'?"),
        ("steps = 3", "unknown key 'steps'. Did you mean 'train.steps'?"),
        (
            '[train]\nsteps = "3"',
            "run.toml: train.steps = '3' must be a whole number from 1 to 1000000000.",
        ),
        ("[train]\nsteps = 0", "train.steps = 0 must be a whole number from 1 to 1000000000."),
        ('[train]\ndtype = "fp8"', "train.dtype = 'fp8'"),
        ("[train", "is not valid TOML"),
        ("[backends]\nattention = 3", "backends.attention"),
        ("backends = 3", "[backends] must be a table"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_settings(toml(tmp_path, text), env={})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.step", "3", "Unknown setting 'train.step' (command line). Did you mean 'train.st"),
        ("steps", "3", "Did you mean 'train.steps'?"),
        (
            "train.steps",
            "many",
            "command line: train.steps = 'many' must be a whole number from 1 to 1",
        ),
        ("train.steps", "-1", "train.steps = -1"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(key, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_settings(None, [(key, value)], env={})


def test_an_unknown_variable_is_an_error_with_the_nearest_right_one():
    with pytest.raises(ConfigError, match=r"PICOTRON_BACKEND. Did you mean 'PICOTRON_BACKENDS'\?"):
        load_settings(env={"PICOTRON_BACKEND": "sdpa"})
    load_settings(env={"PICOTRONIC": "not ours"})


def test_missing_file():
    with pytest.raises(ConfigError, match=r"No config file nowhere.toml"):
        load_settings(Path("nowhere.toml"), env={})


def test_plugins_from_the_environment_replace_those_of_the_file(tmp_path):
    path = toml(tmp_path, '[plugins]\nenable = ["a"]')
    assert load_settings(path, env={}).config.plugins.enable == ["a"]
    found = load_settings(path, env={"PICOTRON_PLUGINS": "b, c"}).config.plugins.enable
    assert found == ["b", "c"]
    assert load_settings(path, env={"PICOTRON_PLUGINS": "none"}).config.plugins.enable == []


def test_one_grammar_for_text_and_table():
    text = parse_backends("attention=sdpa, mem_efficient; *=auto ;naive-math", "x")
    table = parse_backends({"attention": ["sdpa", "mem_efficient"], "*": "auto"}, "x")
    assert text[:2] == table
    assert text[2] == Rule("", ("naive-math",), "x")
    assert parse_backends("", "x") == ()


@pytest.mark.parametrize(
    "text", ["attention=", "=sdpa", "a=b=c", "attention=a,,b", "a=b;a=c", "a;b"]
)
def test_a_malformed_wish_is_an_error(text):
    with pytest.raises(ConfigError, match="Backends from the environment"):
        load_settings(env={"PICOTRON_BACKENDS": text})


def test_a_rule_that_a_stronger_source_overrules_is_gone(tmp_path):
    """It may name a plugin that is not here any more."""
    path = toml(tmp_path, '[backends]\nnorm = "acme/fast"\nloss = "acme/lean"\n"*" = "acme/all"')
    settings = load_settings(path, backends="norm=auto", env={})
    assert [(r.op, r.source) for r in settings.rules] == [
        ("norm", "command line"),
        ("loss", "file"),
        ("*", "file"),
    ]
    settings = load_settings(path, env={"PICOTRON_BACKENDS": "*=auto"})
    assert [rule.source for rule in settings.rules] == ["environment"]
    # A bare name says nothing of the ops that it does not have.
    assert len(load_settings(path, backends="sdpa", env={}).rules) == 4


def test_infinity_is_no_setting():
    with pytest.raises(ConfigError, match=r"run\.timeout_s"):
        load_settings(None, [("run.timeout_s", "inf")], env={})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model", "'model' is a section: model.path, "),
        ("resum", "Did you mean 'resume'?"),
        ("step", "Did you mean 'train.steps'?"),
        ("frobnicate", "`picotron config` lists them all."),
        ("data.micro_batch", "Did you mean 'train.micro_batch'?"),
        ("plugins", "'plugins' is a section: plugins.enable"),
        ("model.rope_scaling", "is a section: model.rope_scaling.rope_type, "),
        ("backends.attention", "Backends are chosen with --backends 'op=name;op=name'"),
    ],
)
def test_what_is_no_setting_is_explained(key, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_settings(None, [(key, "x")], env={})


def test_rules_come_strongest_source_first(tmp_path):
    path = toml(tmp_path, '[backends]\nloss = "c"')
    settings = load_settings(path, backends="norm=a", env={"PICOTRON_BACKENDS": "rope=b"})
    assert [rule.source for rule in settings.rules] == ["command line", "environment", "file"]
