"""Where settings come from: a TOML file, the environment and the command line, read strictly.

Precedence: command line, environment, file, default. This is the only reader of `PICOTRON_*`.
"""

from __future__ import annotations

import codecs
import difflib
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from picotron_core.bounds import allowed
from picotron_core.errors import ConfigError, did_you_mean, quoted, reason
from picotron_core.schema import Config, fields

# Every variable that Picotron reads, and the setting that it overrides.
ENVIRONMENT = {
    "PICOTRON_BACKENDS": "Backends by op, e.g. `attention=sdpa,mem_efficient;*=auto`, or one name.",
    "PICOTRON_PLUGINS": "Plugins to enable, separated by commas, in place of the file's; `none` "
    "enables none but those whose backends are named.",
    "PICOTRON_DEVICE": "The device: auto, cpu, cuda, or a card to simulate (`run.device`).",
    "PICOTRON_CACHE_DIR": "Where tokenised corpora are kept (`data.cache_dir`).",
}

LARGEST = 1 << 20  # bytes of a config file

# Flags of the command line beside the settings.
SHORTHANDS = ("data", "resume", "name", "backends", "plugin", "device", "trace", "help", "debug")


@dataclass(frozen=True, slots=True)
class Rule:
    """One wish for a backend. op: an op's name, "*" for all, "" for "every op that it has"."""

    op: str
    names: tuple[str, ...]
    source: str  # "command line", "environment" or "file"


@dataclass(frozen=True, slots=True)
class Settings:
    """A config and the backend rules of all sources, strongest first."""

    config: Config
    rules: tuple[Rule, ...]


def parse_backends(wish: str | Mapping[str, str | Sequence[str]], source: str) -> tuple[Rule, ...]:
    """The one grammar of backends: "op=name[,name...];...", a bare name, or the same as a table.

    >>> parse_backends("attention=sdpa,mem_efficient;*=auto", "environment")[0].names
    ('sdpa', 'mem_efficient')
    """
    if isinstance(wish, str):
        wish = dict(_entries(wish, source))
    rules: list[Rule] = []
    for op, names in wish.items():
        listed = names.split(",") if isinstance(names, str) else list(names)
        wanted = tuple(name.strip() for name in listed)
        if not all(wanted) or not wanted:
            raise ConfigError(
                f"Backends from the {source}: {op or 'the entry'!r} names no backend in {names!r}. "
                "Write op=name, op=name,name or op=auto."
            )
        rules.append(Rule(op, wanted, source))
    return tuple(rules)


def _entries(text: str, source: str) -> Iterable[tuple[str, str]]:
    seen = set()
    for entry in filter(str.strip, text.split(";")):
        op, equals, names = (part.strip() for part in entry.partition("="))
        if not equals:
            op, names = "", op
        elif not op or "=" in names:
            raise ConfigError(
                f"Backends from the {source}: cannot read {entry.strip()!r}. "
                "Write op=name[,name], entries separated by ';'."
            )
        if op in seen:
            raise ConfigError(
                f"Backends from the {source}: {op or 'a bare name'!r} is given twice. Keep one."
            )
        seen.add(op)
        yield op, names


def load_settings(
    path: Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    backends: str = "",
    env: Mapping[str, str] | None = None,
) -> Settings:
    """Read everything that decides a run.

    Args:
        path: a TOML file, or None.
        overrides: ("train.steps", "200") pairs from the command line; the last of a key wins, but
            the values of a list setting add up ("" adds none).
        backends: the command line's `--backends`.
        env: the environment; None means the process's own.

    Raises: ConfigError that names the file or flag, the key, and the nearest right one.
    """
    env = os.environ if env is None else env
    _check_environment(env)
    values = _read_toml(path) if path is not None else {}
    file_backends = values.pop("backends", {})
    where = str(path)
    if not isinstance(file_backends, str | dict):
        raise ConfigError(f"{where}: [backends] must be a table of op = name, or a string.")
    config = _validate(values, where)
    config = _override(config, _from_environment(env), "environment")
    config = _override(config, overrides, "command line")
    _check_homes(config)
    rules = (
        *parse_backends(backends, "command line"),
        *parse_backends(env.get("PICOTRON_BACKENDS", ""), "environment"),
        *parse_backends(_checked_table(file_backends, where), "file"),
    )
    return Settings(config, tuple(_not_shadowed(rules)))


def _not_shadowed(rules: Sequence[Rule]) -> Iterable[Rule]:
    """Without the rules that a stronger source has overruled: they need not even be possible."""
    settled: dict[str, set[str]] = {}  # by source, the ops that it speaks of
    for rule in rules:
        stronger = set().union(*(ops for s, ops in settled.items() if s != rule.source), set())
        if "*" not in stronger and (rule.op not in stronger or not rule.op):
            yield rule
        settled.setdefault(rule.source, set()).add(rule.op)


def _checked_table(table: Any, where: str) -> str | dict[str, str | list[str]]:
    return table if isinstance(table, str) else _validate({"backends": table}, where).backends


def expanded(path: str | Path, *, what: str) -> Path:
    """A path whose `~` is the user's home folder.

    Raises: ConfigError where there is none, as in some containers, or no user of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{what} = {quoted(str(path))}: there is no such home folder. Set HOME, or write the "
            "whole path."
        ) from None


def _check_homes(config: Config) -> None:
    run, data, model = config.run, config.data, config.model
    paths = [("run.dir", run.dir), ("data.cache_dir", data.cache_dir), ("model.path", model.path)]
    paths += [("data.tokenizer", data.tokenizer), *(("data.paths", path) for path in data.paths)]
    for key, path in paths:
        expanded(path, what=key)


def _check_environment(env: Mapping[str, str]) -> None:
    for name in env:
        if name.startswith("PICOTRON_") and name not in ENVIRONMENT:
            raise ConfigError(
                f"Unknown environment variable {name}. {did_you_mean(name, ENVIRONMENT)}"
            )


def _from_environment(env: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    if device := env.get("PICOTRON_DEVICE"):
        found.append(("run.device", device))
    if cache := env.get("PICOTRON_CACHE_DIR"):
        found.append(("data.cache_dir", cache))
    if plugins := env.get("PICOTRON_PLUGINS"):
        names = [] if plugins.strip() == "none" else plugins.split(",")
        found += [("plugins.enable", name.strip()) for name in ["", *names]]
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"The config {path} is not a plain file. Name a TOML file.")
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"No config file {path}. Check the path; `picotron examples` has some to begin with."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"The config {path} is a folder. Name a TOML file in it.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}: {error.strerror}.") from None
    if len(data) > LARGEST:
        raise ConfigError(
            f"The config file {path} has more than {LARGEST} bytes: it is no config. Name another."
        )
    text = _decoded(data, path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {reason(error)}.") from None


def _without_waiting(name: str, flags: int) -> int:
    """Opening a pipe waits for its other end; for a plain file O_NONBLOCK means nothing."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _decoded(data: bytes, path: Path) -> str:
    """The text of a config. A byte-order mark of UTF-8 is left out. Bytes that are not UTF-8 are
    kept as Python keeps them in the names of files, for a path may have them; settings of other
    kinds refuse them.
    """
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
    if data.startswith(marks) or b"\0" in data:
        raise ConfigError(
            f"{path} is not UTF-8 (UTF-16, or no text at all): save it as UTF-8, e.g. with "
            "iconv -f UTF-16 -t UTF-8, or by the choice of encoding in your editor."
        )
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _validate(values: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def _explain(error: ValidationError, where: str) -> str:
    """The first mistake in one line: the setting, what was found, and what it may be."""
    first = error.errors(include_url=False)[0]
    # A setting that may be of two kinds has an error of each.
    count = len({found["loc"][:2] for found in error.errors(include_url=False)})
    more = f" (and {count - 1} more)" if count > 1 else ""
    key = ".".join(str(part) for part in first["loc"])
    known = dict(fields())
    unreadable = first["type"] == "string_unicode" and key not in known  # the key is not UTF-8
    if unreadable:
        key = f"{key}.{first['input']}".lstrip(".")
    if unreadable or first["type"] == "extra_forbidden":
        return f"{where}: unknown key {quoted(key)}. {_nearest_key(key)}{more}"
    # After the setting's own name: the number of a list's item, the kind that a union tried.
    while key not in known and "." in key:
        key = key.rpartition(".")[0]
    if first["type"] == "value_error":
        wanted = str(first["ctx"]["error"])
    elif key in known:
        wanted = f"must be {allowed(known[key])}."
    else:
        wanted = f"is a section: write it as a table, [{key}]."
    key = ".".join(map(str, first["loc"][:2])) if key == "backends" else key
    return f"{where}: {key} = {quoted(first['input'])} {wanted}{more}"


def _nearest_key(key: str) -> str:
    """The setting that was meant, by its whole name or by its last part alone (`--step 5`)."""
    names = {name: name for name, _ in fields()}
    if key in names:  # in quotes, a name with a full stop is one key
        section, _, last = key.rpartition(".")
        return f"Write {last} = ... in the table [{section}]."
    for name in list(names):
        names.setdefault(name.rsplit(".", 1)[-1], name)
    if "." not in key:
        names |= {section: section for section in Config.model_fields}
    key = key.lower()
    last = key.rsplit(".", 1)[-1]
    if last in names:
        return f"Did you mean {names[last]!r}?"
    for word in (key, last):
        near = difflib.get_close_matches(word, names, n=1)
        if near:
            return f"Did you mean {names[near[0]]!r}?"
    return "`picotron config` lists them all."


def _nearest_flag(key: str) -> str:
    section = key.split(".")[0]
    if section == "backends":
        return "Backends are chosen with --backends 'op=name;op=name'."
    if key in Config.model_fields or key == "model.rope_scaling":
        keys = [name for name, _ in fields() if name.startswith(f"{key}.")]
        return f"{key!r} is a section: {', '.join(keys)}."
    near = did_you_mean(key, SHORTHANDS)
    return near if near.startswith("Did") else _nearest_key(key)


def _override(config: Config, pairs: Iterable[tuple[str, str]], source: str) -> Config:
    """The config with text values laid over it, each read as its field's type."""
    known = dict(fields())
    values = config.model_dump()
    lists: dict[str, list[str]] = {}
    for key, text in pairs:
        field = known.get(key)
        if field is None or key in ("model.rope_scaling", "backends"):
            raise ConfigError(f"Unknown setting {quoted(key)} ({source}). {_nearest_flag(key)}")
        if get_origin(field.annotation) is list:
            lists.setdefault(key, []).extend(filter(None, [text]))
            value: Any = lists[key]
        else:
            value = _read_text(field, key, text, source)
        table = values
        *sections, name = key.split(".")
        for section in sections:
            table[section] = table[section] or {}
            table = table[section]
        table[name] = value
    return _validate(values, source)


def _read_text(field: FieldInfo, key: str, text: str, source: str) -> Any:
    try:
        return TypeAdapter[Any](field.annotation or str).validate_strings(text)
    except ValidationError:
        raise ConfigError(f"{source}: {key} = {quoted(text)} must be {allowed(field)}.") from None
