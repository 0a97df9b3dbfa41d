"""All settings: typed, strict, from a TOML file, the environment and the command line.

Precedence: command line, environment, file, default. This is the only reader of `PICOTRON_*`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from picotron_core.errors import ConfigError, did_you_mean

# Every variable that Picotron reads, and the setting that it overrides.
ENVIRONMENT = {
    "PICOTRON_BACKENDS": "Backends by op, e.g. `attention=sdpa,mem_efficient;*=auto`, or one name.",
    "PICOTRON_PLUGINS": "Plugins to enable, separated by commas, in place of the file's; `none` "
    "enables none but those whose backends are named.",
    "PICOTRON_DEVICE": "The device to run on: auto, cpu or cuda (`run.device`).",
    "PICOTRON_CACHE_DIR": "Where tokenised corpora are kept (`data.cache_dir`).",
}

# Flags of the command line beside the settings.
SHORTHANDS = ("data", "resume", "name", "backends", "plugin", "device", "help", "debug")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RopeScaling(Section):
    rope_type: Literal["llama3", "linear"] = Field("llama3", description="The kind of scaling.")
    factor: float = Field(8.0, gt=0, description="How much longer the context becomes.")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: where full scaling begins.")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: where scaling ends.")
    original_max_position_embeddings: int = Field(
        8192, ge=1, description="llama3: the context the frequencies were trained for."
    )


class Model(Section):
    """The architecture, by the names of transformers' `LlamaConfig`."""

    path: str = Field(
        "", description="A Hugging Face folder or hub name; its config replaces the fields below."
    )
    pretrained: bool = Field(True, description="With `path`: start from its weights as well.")
    hidden_size: int = Field(256, ge=1, description="Model dim E.")
    intermediate_size: int = Field(704, ge=1, description="Width of the SwiGLU MLP.")
    num_hidden_layers: int = Field(6, ge=1, description="Number of layers.")
    num_attention_heads: int = Field(8, ge=1, description="Query heads H.")
    num_key_value_heads: int = Field(4, ge=1, description="Key/value heads K; divides H.")
    head_dim: int = Field(0, ge=0, description="Head dim D; 0 means hidden_size / heads.")
    max_position_embeddings: int = Field(2048, ge=1, description="The longest context.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(None, description="Rotary scaling, as in Llama 3.")
    tie_word_embeddings: bool = Field(True, description="The head shares the embedding's weight.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of every norm.")
    initializer_range: float = Field(0.02, gt=0, description="Deviation of the initial weights.")


class Data(Section):
    """The text, and how it becomes tokens."""

    paths: list[str] = Field(
        default_factory=list,
        description="Text files, folders, .jsonl, .parquet, or a Hugging Face dataset name; "
        "nothing means the source of Python's standard library on this machine.",
    )
    text_field: str = Field("text", description="The field or column that holds the text.")
    split: str = Field("train", description="The split of a Hugging Face dataset.")
    tokenizer: str = Field(
        "", description="A Hugging Face tokenizer (folder or hub name); nothing means: train one."
    )
    vocab_size: int = Field(4096, ge=257, description="Tokens of the tokenizer that is trained.")
    seq_len: int = Field(256, ge=1, description="Tokens per sample.")
    val_fraction: float = Field(0.05, gt=0, lt=1, description="Share held out for validation.")
    document_mask: bool = Field(
        False, description="A token attends only within its own document (`doc_ids`)."
    )
    cache_dir: str = Field("~/.cache/picotron", description="Where tokenised corpora are kept.")


class Train(Section):
    """The optimisation."""

    steps: int = Field(1000, ge=1, description="Optimizer steps in all.")
    micro_batch: int = Field(8, ge=1, description="Samples per forward, on each rank.")
    accumulation: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate over the peak.")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="Decay after warmup; wsd holds the peak, then decays at the end."
    )
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warmup.")
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="wsd: the share of all steps that the last decay takes."
    )
    weight_decay: float = Field(0.1, ge=0, description="Decoupled; not on norms and embeddings.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second-moment decay.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 means no limit.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute dtype; master weights are always float32."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Of the initial weights and of the data's order."
    )
    eval_every: int = Field(200, ge=0, description="Steps between evaluations; 0: only at the end.")
    eval_samples: int = Field(
        256, ge=1, description="Validation samples per evaluation, spread evenly over the text."
    )


class Checkpoint(Section):
    """What is kept of a run."""

    every: int = Field(500, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")


class Run(Section):
    """Where a run goes and what it prints."""

    dir: str = Field("runs", description="The folder that run folders are made in.")
    name: str = Field("", description="The run's folder; nothing means one from the date.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="The device to run on.")
    log_every: int = Field(10, ge=1, description="Steps between printed lines in a pipe.")
    sample: str = Field("", description="A prompt to continue when training ends.")
    timeout_s: float = Field(600.0, gt=0, description="Longest wait in a collective, in seconds.")


class Plugins(Section):
    """Third-party plugins: installed is not enabled."""

    enable: list[str] = Field(default_factory=list, description="Names of plugins to load.")


class Config(Section):
    """Everything that decides a run, with the seed."""

    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    run: Run = Field(default_factory=Run)
    plugins: Plugins = Field(default_factory=Plugins)
    backends: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="Backends by op: a name, names in order of preference, or auto.",
    )


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
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"No config file {path}. Check the path, or see examples/.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def _validate(values: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def _explain(error: ValidationError, where: str) -> str:
    """The first mistake in one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}. {_nearest_key(key)}{more}"
    return f"{where}: {key} = {first['input']!r}: {_lower_first(first['msg'])}.{more}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _nearest_key(key: str) -> str:
    known = {name: name for name, _ in fields()}
    last = key.rsplit(".", 1)[-1]
    for name in known.copy():
        known.setdefault(name.rsplit(".", 1)[-1], name)
    same_end = known.get(last)
    if same_end is not None:
        return f"Did you mean {same_end!r}?"
    sections = [*Config.model_fields] if "." not in key else []
    return did_you_mean(key, [*sections, *(name for name, _ in fields())])


def _nearest_flag(key: str) -> str:
    section = key.split(".")[0]
    if section == "backends":
        return "Backends are chosen with --backends 'op=name;op=name'."
    if key in Config.model_fields:
        keys = [name for name, _ in fields() if name.startswith(f"{key}.")]
        return f"{key!r} is a section: {', '.join(keys)}."
    near = did_you_mean(key, SHORTHANDS)
    return near if near.startswith("Did") else _nearest_key(key)


def fields() -> Iterable[tuple[str, FieldInfo]]:
    """Every setting: ("train.steps", its field), in the order of the sections."""
    for section, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, setting in field.annotation.model_fields.items():
                yield f"{section}.{name}", setting
                if setting.annotation == RopeScaling | None:
                    for inner, scaling in RopeScaling.model_fields.items():
                        yield f"{section}.{name}.{inner}", scaling
        else:
            yield section, field


def _override(config: Config, pairs: Iterable[tuple[str, str]], source: str) -> Config:
    """The config with text values laid over it, each read as its field's type."""
    known = dict(fields())
    values = config.model_dump()
    lists: dict[str, list[str]] = {}
    for key, text in pairs:
        field = known.get(key)
        if field is None or key in ("model.rope_scaling", "backends"):
            raise ConfigError(f"Unknown setting {key!r} ({source}). {_nearest_flag(key)}")
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
    except ValidationError as error:
        message = _lower_first(error.errors()[0]["msg"])
        raise ConfigError(f"{key} = {text!r} ({source}): {message}.") from None
