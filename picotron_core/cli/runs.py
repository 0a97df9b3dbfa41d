"""Which run a command was given, and the model that the run's folder describes."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from picotron_core.checkpoint.load import Checkpoint, find_checkpoint
from picotron_core.checkpoint.manifest import Facts
from picotron_core.cli.model import architecture_of
from picotron_core.cli.paths import is_same, located
from picotron_core.data.tokenizer import Tokenizer, open_tokenizer
from picotron_core.data.tokenizer_files import tokenizer_files
from picotron_core.engine.model_record import ModelRecord, make_record, read_record
from picotron_core.engine.run_directory import RunDirectory, refuse_links
from picotron_core.errors import ConfigError, DamagedFileError
from picotron_core.schema import Config

log = logging.getLogger("picotron")
# Of [model]: where the weights of step 0 came from.
ORIGIN = ("path", "pretrained", "resize_embeddings")


def find_run_folder(given: Path | str) -> tuple[RunDirectory, Path]:
    """The run that a path means, and the folder to look for its checkpoint in.

    Args:
        given: a run's folder or one of its checkpoints: relative to the working folder, "." in one
            of them, or a link to one.

    Raises: ConfigError where no run is there, or a folder in it is a link; DamagedFileError where
        its config.toml is not a plain file.
    """
    run, wanted = located(given)
    config = run / "config.toml"
    try:
        mode = config.lstat().st_mode
    except PermissionError:
        raise ConfigError(
            f"{given} is another user's, who lets you not read it. Have that user run "
            f"`chmod -R a+rX {run}`, or give you a copy."
        ) from None
    except OSError:
        raise ConfigError(
            f"{given} is not a run: it has no config.toml. `ls runs` shows what there is; a "
            "config.toml that was lost can be restored from a copy of the run's folder."
        ) from None
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "not a plain file"
        raise DamagedFileError(f"{config} is {what}. Restore it from a copy of the run's folder.")
    refuse_links(RunDirectory(run))
    return RunDirectory(run), wanted


def open_run(given: Path | str) -> tuple[RunDirectory, Checkpoint]:
    """The run that a path means, and its newest whole checkpoint, or the one that is given."""
    run, wanted = find_run_folder(given)
    return run, find_checkpoint(wanted)


def model_of(run: RunDirectory, facts: Facts, config: Config) -> ModelRecord:
    """The model of a run, from the run's folder alone.

    Args:
        facts: of a checkpoint of the run.
        config: the run's settings, for which `refuse_other_model` is asked.

    Raises: DamagedFileError that names the file; ConfigError.
    """
    refuse_other_model(config, facts, run)
    if facts.files:
        return read_record(run, facts.files, eos_id=facts.eos_id, ends=facts.ends)
    # A run of an earlier version, which kept the tokenizer alone.
    tokenizer = open_tokenizer(run.tokenizer, eos_id=facts.eos_id)
    return new_record(config, tokenizer, kept=tokenizer_files(tokenizer))


def new_record(
    config: Config, tokenizer: Tokenizer, *, kept: Mapping[str, bytes] | None = None
) -> ModelRecord:
    """The record of a run that begins.

    Args:
        kept: the tokenizer's files where they are not to be taken from where the settings say.

    Raises: ConfigError where the model folder or the tokenizer cannot be read.
    """
    from picotron_core.model.pretrained import read_generation_config

    bos_id = tokenizer.prefix[0] if len(tokenizer.prefix) == 1 else None
    architecture = architecture_of(
        config, tokenizer.vocab_size, bos_id=bos_id, eos_id=tokenizer.eos_id
    )
    files = tokenizer_files(tokenizer, tokenizer_source(config)) if kept is None else kept
    ends = end_tokens(config, tokenizer)
    path = config.model.path
    generation_config = read_generation_config(path) if path else None
    if path and _has_another_tokenizer(config):
        # Another tokenizer than the base model's: an id of the model's may be any token of it.
        bos, pad = architecture.bos_token_id, architecture.pad_token_id
        if bos_id is None and bos is not None and tokenizer.is_special(bos):
            bos_id = bos
        pad_id = pad if pad is not None and tokenizer.is_special(pad) else None
        architecture = replace(
            architecture, bos_token_id=bos_id, eos_token_id=ends, pad_token_id=pad_id
        )
        if generation_config is not None:
            ids = {"bos_token_id": bos_id, "eos_token_id": ends, "pad_token_id": pad_id}
            changed = json.dumps(json.loads(generation_config) | ids, indent=2)
            generation_config = f"{changed}\n".encode()
    # Training ends each document by the tokenizer's EOS: transformers must end a text by it, too.
    if tokenizer.eos_id not in _ids(architecture.eos_token_id):
        architecture = replace(architecture, eos_token_id=ends)
    if generation_config is not None:
        values = json.loads(generation_config)
        if tokenizer.eos_id not in _ids(values.get("eos_token_id")):
            changed = json.dumps(values | {"eos_token_id": ends}, indent=2)
            generation_config = f"{changed}\n".encode()
    return make_record(
        architecture,
        files,
        eos_id=tokenizer.eos_id,
        ends=ends,
        generation_config=generation_config,
    )


def _ids(eos: Any) -> list[int]:
    """An eos_token_id as Hugging Face's configs have it: an id, several, or none."""
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def tokenizer_source(config: Config) -> str:
    """Where the settings say that the tokenizer is; "" where it is trained."""
    return config.data.tokenizer or config.model.path


def _has_another_tokenizer(config: Config) -> bool:
    """Whether the settings name another tokenizer than the base model's own."""
    return bool(config.data.tokenizer) and not is_same(config.data.tokenizer, config.model.path)


def end_tokens(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's EOS, by which training ends each document, and those of the base model.

    With a tokenizer that is not the model's own, an id of the model's may be any token of it: only
    special tokens are taken for ends there.
    """
    ends = [tokenizer.eos_id]
    if config.model.path:
        from picotron_core.model.pretrained import load_end_tokens

        ends += load_end_tokens(config.model.path)
    if _has_another_tokenizer(config):
        ends = [token for token in ends if token == tokenizer.eos_id or tokenizer.is_special(token)]
    return tuple(dict.fromkeys(ends))


def with_origin(config: Config, facts: Facts) -> Config:
    """The config of a run that goes on: its weights, tokenizer and architecture come from its own
    folder, so a base model that is named now is only told as where it began.
    """
    recorded = facts.config.get("model") or {}
    began = {"path": recorded.get("path", ""), "pretrained": recorded.get("pretrained", True)}
    if not is_same(config.model.path, began["path"]):
        log.warning(
            "model.path = %r has no effect on a run that goes on: its model is in its own folder.",
            config.model.path,
        )
    return config.model_copy(update={"model": config.model.model_copy(update=began)})


def tokenizer_of(config: Config, kept: ModelRecord | None, facts: Facts | None) -> str | Tokenizer:
    """What text becomes tokens by: for a run that goes on what its folder holds, unless the
    settings name another now, which is then found to differ or not.
    """
    source = tokenizer_source(config)
    if not (kept and facts and source):
        return source
    recorded = (facts.config.get("data") or {}).get("tokenizer", "")
    if not is_same(config.data.tokenizer, recorded):
        return source
    return kept.tokenizer


def refuse_other_model(config: Config, facts: Facts, run: RunDirectory) -> None:
    """Check that the settings describe the model that the checkpoint holds.

    Raises: ConfigError that names the first setting that differs.
    """
    recorded: Mapping[str, Any] = facts.config.get("model") or {}
    now = config.model.model_dump(mode="json", exclude_none=True)
    for key in recorded.keys() | now.keys() if recorded else ():
        if key in ORIGIN or recorded.get(key) == now.get(key):
            continue
        if key not in recorded and now[key] == type(config.model)().model_dump()[key]:
            continue  # a setting that the version which saved the checkpoint did not have
        raise ConfigError(
            f"model.{key} is {now.get(key)!r} in the settings, but the model of {run.path} was "
            f"made with {recorded.get(key)!r}. Restore it in {run.config} or leave out the flag; "
            "for another model, start a new run."
        )
