"""Every setting says what it may be, and refuses the rest in one line before anything is done."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from picotron_core.bounds import allowed, seconds_of
from picotron_core.config import load_settings
from picotron_core.errors import ConfigError
from picotron_core.schema import fields

TOO_LARGE = ["18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000]
NUMBERS = [(key, field) for key, field in fields() if "number" in allowed(field)]


def refused(*overrides: tuple[str, str], path: Path | None = None, env=None) -> str:
    with pytest.raises(ConfigError) as error:
        load_settings(path, overrides, env=env or {})
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 800
    return said


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("key", [key for key, _ in NUMBERS])
def test_every_number_has_bounds_that_its_error_names(key):
    for text in (*TOO_LARGE, "-1", "nan", "-inf", "1e400", "x", ""):
        said = refused((key, text))
        assert said.startswith(f"command line: {key} = ")
        assert allowed(dict(fields())[key]) in said


# What would round to nothing, overflow, hang, or compute what nobody wants.
NONSENSE = [
    ("train.lr", "1e-300"),
    ("train.lr", "1e30"),
    ("train.lr", "0"),
    ("train.eps", "0"),
    ("train.eps", "1e-300"),
    ("train.beta1", "1"),
    ("train.beta2", "1.0"),
    ("train.beta2", "0.99999999"),
    ("train.clip", "1e-300"),
    ("train.weight_decay", "1e10"),
    ("train.min_lr_ratio", "1.5"),
    ("train.decay_fraction", "1e-300"),
    ("train.loss_scale", "1e30"),
    ("train.loss_scale", "1e-40"),
    ("train.micro_batch", "100000000"),
    ("train.steps", "99999999999"),
    ("train.steps", "1.5"),
    ("train.steps", "1e3"),
    ("train.steps", "0x10"),
    ("train.steps", "true"),
    ("model.hidden_size", "0"),
    ("model.hidden_size", "1e3"),
    ("model.rms_norm_eps", "1e-50"),
    ("model.initializer_range", "1e30"),
    ("model.rope_theta", "1e-3"),
    ("model.rope_scaling.factor", "0.01"),
    ("model.tie_word_embeddings", "maybe"),
    ("model.tie_word_embeddings", "2"),
    ("data.vocab_size", "4294967296"),
    ("data.vocab_size", "256"),
    ("data.seq_len", "0"),
    ("data.val_fraction", "1e-300"),
    ("data.val_fraction", "1"),
    ("data.val_fraction", "0.9999999"),
    ("data.cache_dir", ""),
    ("data.cache_dir", "a\0b"),
    ("data.cache_dir", "~nobody-of-that-name/x"),
    ("data.paths", "a\0b"),
    ("data.paths", "x" * 5000),
    ("data.text_field", "\udce9"),
    ("parallel.bucket_mb", "1e-300"),
    ("parallel.bucket_mb", "0"),
    ("checkpoint.keep", "0"),
    ("checkpoint.keep", "1"),
    ("checkpoint.every", "often"),
    ("checkpoint.every", "-5"),
    ("checkpoint.max_mb_per_s", "1e-300"),
    ("run.timeout_s", "1e300"),
    ("run.timeout_s", "0"),
    ("run.timeout_s", "1e-9"),
    ("run.trace", "1000000000"),
    ("run.dir", ""),
    ("run.dir", "   "),
    ("run.name", "."),
    ("run.name", ".."),
    ("run.name", "a/b"),
    ("run.name", "/"),
    ("run.name", "two\nlines"),
    ("run.name", "\x1b[31mred"),
    ("run.name", "x" * 300),
    ("run.name", "é" * 128),
    ("run.sample", "\udcff"),
    ("run.sample", "x" * 200_000),
    ("run.time_limit", "999999999999:00:00"),
    ("run.time_limit", "9" * 5000),
    ("run.time_limit", "367-0"),
    ("run.time_limit", "-1"),
    ("run.time_limit", "1e300"),
    ("run.time_limit", "nan"),
    ("run.time_limit", "\uff11:00"),
    ("plugins.enable", "caf\udce9"),
]


@pytest.mark.parametrize(("key", "text"), NONSENSE, ids=lambda value: ascii(value)[:40])
def test_nonsense_is_refused_by_name(key, text):
    said = refused((key, text))
    assert f"{key} = " in said
    said.encode()  # it can be printed


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "1_000", 1000),
        ("train.steps", " 7 ", 7),
        ("train.clip", "0", 0.0),
        ("checkpoint.max_mb_per_s", "0", 0.0),
        ("checkpoint.every", "auto", "auto"),
        ("model.tie_word_embeddings", "False", False),
        ("model.tie_word_embeddings", "yes", True),
        ("data.cache_dir", "caf\udce9", "caf\udce9"),
        ("run.time_limit", "366-0", "366-0"),
        ("train.seed", "9223372036854775807", 2**63 - 1),
    ],
)
def test_what_makes_sense_is_taken(key, text, value):
    section, name = key.split(".")
    found = getattr(getattr(load_settings(None, [(key, text)], env={}).config, section), name)
    assert found == value


def test_a_time_limit_of_zero_is_none():
    assert seconds_of("") == seconds_of("0") == seconds_of("0:00") == 0.0


TABLES = {
    "a date": ("[train]\nsteps = 2026-01-01", "train.steps = datetime.date(2026, 1, 1) must be"),
    "nan": ("[train]\nlr = nan", "train.lr = nan must be a number from"),
    "a table for a number": ("[train.steps]\nx = 1", "train.steps = {'x': 1} must be"),
    "a list for a number": ("[train]\nlr = [1, 2]", "train.lr = [1, 2] must be"),
    "a number for a section": ("train = 3", "train = 3 is a section: write it as a table, [train]"),
    "a list for a section": ("data = []", "data = [] is a section"),
    "a number in a list": ("[data]\npaths = ['a', 3]", "data.paths = 3 must be a list of texts"),
    "text for a list": ("[data]\npaths = 'a'", "data.paths = 'a' must be a list of texts"),
    "text for a switch": ("[model]\npretrained = 'true'", "must be true or false"),
    "a number for a switch": ("[model]\npretrained = 1", "must be true or false"),
    "a switch for a number": ("[train]\nsteps = true", "train.steps = True must be"),
    "a float for a whole number": ("[train]\nsteps = 10.0", "train.steps = 10.0 must be"),
    "duplicate keys": ("[train]\nsteps = 1\nsteps = 2", "is not valid TOML"),
    "a duplicate table": ("[train]\n[train]", "is not valid TOML"),
    "another case": ("[Train]\nsteps = 1", "unknown key 'Train'. Did you mean 'train'?"),
    "capitals": ("[train]\nSTEPS = 1", "Did you mean 'train.steps'?"),
    "a huge hexadecimal number": ("[train]\nsteps = 0x" + "f" * 9000, "too large to show"),
    "a huge number": ("[train]\nsteps = " + "9" * 9000, "is not valid TOML"),
    "2**64": ("[train]\nmicro_batch = 18446744073709551616", "train.micro_batch = 184467"),
    "a float that overflows": ("[train]\nlr = 1" + "0" * 400, "train.lr = 1000"),
    "a long value": ("[run]\ndevice = '" + "x" * 200_000 + "'", "run.device = 'xxx"),
    "a long key": ("x" * 9000 + " = 1", "unknown key 'xxx"),
    "deep nesting": ("a = " + "[" * 100_000, "is not valid TOML"),
    "deep tables": ("[" + ".".join("a" * 9000) + "]", "un"),
    "NUL": ("[run]\nname = 'a\0b'", "is not UTF-8"),
    "an escaped NUL": ('[run]\nsample = "a\\u0000b"', "run.sample = 'a\\x00b' has a NUL"),
    "an escaped NUL in a path": ('[data]\npaths = ["a\\u0000b"]', "data.paths = 'a\\x00b' has a"),
    "a name in quotes": ('"train.steps" = 5', "Write steps = ... in the table [train]."),
    "one setting of two kinds": ("[checkpoint]\nevery = -1", "1000000000 or 'auto'."),
    "no table": ("just words", "is not valid TOML"),
    "JSON": ('{"train": {"steps": 3}}', "is not valid TOML"),
    "backends that are no names": ("[backends]\nnorm = [1]", "backends.norm"),
    "backends in tables": ("[backends.norm]\na = 'b'", "backends.norm"),
}


@pytest.mark.parametrize("mistake", TABLES)
def test_a_table_that_is_wrong_is_named(tmp_path, mistake):
    text, wanted = TABLES[mistake]
    said = refused(path=written(tmp_path, text))
    assert wanted in said
    assert "more)" not in said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_config_in_another_encoding_says_how_to_save_it(tmp_path, encoding):
    path = written(tmp_path, "[train]\nsteps = 3\n".encode(encoding))
    said = refused(path=path)
    assert "save it as UTF-8" in said
    assert said.count(str(path)) == 1


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    path = written(tmp_path, "[train]\r\nsteps = 3\r\n".encode("utf-8-sig"))
    assert load_settings(path, env={}).config.train.steps == 3


def test_bytes_that_are_not_utf8_may_be_in_a_path_alone(tmp_path):
    path = written(tmp_path, b"[data]\npaths = ['caf\xe9']\n")
    assert load_settings(path, env={}).config.data.paths == ["caf\udce9"]
    assert "is not UTF-8 text" in refused(path=written(tmp_path, b"[run]\nsample = 'caf\xe9'\n"))
    assert "train.dtype" in refused(path=written(tmp_path, b"[train]\ndtype = 'caf\xe9'\n"))
    assert "unknown key" in refused(path=written(tmp_path, b"'caf\xe9' = 1\n"))


def test_what_is_no_plain_file_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.toml"))
    for name in ("pipe", "folder", "loop", "device", "socket", "x" * 300, "none", "folder.toml/x"):
        said = refused(path=tmp_path / f"{name}.toml")
        assert name in said


def test_a_huge_file_is_no_config(tmp_path):
    with (tmp_path / "run.toml").open("wb") as file:
        file.truncate(10**9)
    assert "more than" in refused(path=tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PICOTRON_BACKENDS", "caf\udce9=\udcff"),
        ("PICOTRON_BACKENDS", "\0"),
        ("PICOTRON_BACKENDS", ";;=;"),
        ("PICOTRON_CACHE_DIR", " "),
        ("PICOTRON_CACHE_DIR", "~nobody-of-that-name"),
        ("PICOTRON_CACHE_DIR", "x" * 10_000),
        ("PICOTRON_DEVICE", "\udcff"),
        ("PICOTRON_PLUGINS", "\udcff"),
        ("PICOTRON_\udcff", "x"),
        ("PICOTRON_", ""),
    ],
)
def test_a_variable_that_is_wrong_is_one_line(name, value, picotron, monkeypatch):
    if "\0" not in value:
        monkeypatch.setenv(name, value)
        code, out, err = picotron("backends")
        assert code == 2, (out, err)
        said = [line for line in (out + err).splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert "bug" not in said[0]
        return
    with pytest.raises(ConfigError):
        load_settings(env={name: value + "="})


def test_an_empty_variable_changes_nothing():
    names = ("BACKENDS", "PLUGINS", "DEVICE", "CACHE_DIR")
    empty = {f"PICOTRON_{name}": "" for name in names}
    assert load_settings(env=empty) == load_settings(env={})


def test_a_home_that_nobody_knows_is_named(monkeypatch):
    def unknown(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert "data.cache_dir = '~/.cache/picotron': there is no such home" in refused()
    load_settings(None, [("data.cache_dir", "cache")], env={})
