"""`picotron generate`: continue a prompt with the model of a run, or of a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

import torch

from picotron_core.checkpoint.load import Checkpoint, load_weights_only
from picotron_core.cli.runs import model_of
from picotron_core.cli.selection import find_device, open_quarantine, open_registry, select
from picotron_core.config import Settings
from picotron_core.data.detokenizer import Detokenizer
from picotron_core.data.pretrained_tokenizer import load_tokenizer
from picotron_core.data.tokenizer import TOKENIZER, Tokenizer
from picotron_core.engine.generate import generate, refuse_prompt
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError
from picotron_core.hardware import Device, stand_in
from picotron_core.model.architecture import Architecture
from picotron_core.model.llama import Llama
from picotron_core.model.model_folder import INDEX, WEIGHTS
from picotron_core.model.pretrained import (
    load_architecture,
    load_dtype,
    load_end_tokens,
    load_weights,
)
from picotron_core.model.requests import requests
from picotron_core.precision import Precision, choose_precision
from picotron_core.registry.bind import bind, tried_on
from picotron_core.registry.breadcrumb import breadcrumb

SAMPLE_TOKENS = 200
log = logging.getLogger("picotron")


def is_model_folder(path: Path) -> bool:
    """Whether it is a Hugging Face folder, if only in part; a run's folder has a config.toml."""
    has_file = any((path / name).is_file() for name in ("config.json", WEIGHTS, INDEX, TOKENIZER))
    return has_file and not lexists(path / "config.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """What writes text: the model of a run, or of a Hugging Face folder.

    ends: the tokens that end a text. dtype: as in `train.dtype`. load: fills a model.
    """

    tokenizer: Tokenizer
    architecture: Architecture
    ends: tuple[int, ...]
    dtype: str
    load: Callable[[Llama], None]


def writer_of_run(settings: Settings, run: RunDirectory, checkpoint: Checkpoint) -> Writer:
    """The model that a run has trained."""
    facts = checkpoint.manifest.facts
    record = model_of(run, facts, settings.config)
    return Writer(
        tokenizer=record.tokenizer,
        architecture=record.architecture,
        ends=record.ends,
        dtype=facts.dtype or settings.config.train.dtype,
        load=lambda model: load_weights_only(dict(model.named_parameters()), checkpoint),
    )


def writer_of_folder(folder: Path) -> Writer:
    """The model of a Hugging Face folder, e.g. of one that `picotron export` wrote."""
    architecture = load_architecture(folder)
    tokenizer = load_tokenizer(str(folder), remedy="Put the model's own tokenizer there.")
    return Writer(
        tokenizer=tokenizer,
        architecture=architecture,
        ends=(tokenizer.eos_id, *load_end_tokens(folder)),
        dtype=load_dtype(folder),
        load=lambda model: load_weights(model, folder),
    )


def write_text(
    settings: Settings,
    writer: Writer,
    *,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print the prompt and its continuation, as it is written: the text of all their tokens
    together, without special ones.

    Args:
        max_new_tokens: None means SAMPLE_TOKENS, or as many as the model's context still holds.
    """
    architecture, tokenizer = writer.architecture, writer.tokenizer
    ids = tokenizer.encode_prompt(prompt)
    if max_new_tokens is None:
        room = architecture.max_position_embeddings - len(ids)
        max_new_tokens = max(1, min(SAMPLE_TOKENS, room))
    refuse_prompt(architecture, ids, max_new_tokens)
    quarantine = open_quarantine(settings)
    registry = open_registry(settings, quarantine)
    device = find_device(settings, registry)
    precision = _precision(writer.dtype, device)
    wanted = requests(
        architecture,
        device=device,
        dtype=precision.compute,
        seq_len=architecture.max_position_embeddings,
        micro_batch=1,
        document_mask=False,
        training=False,
        world_size=1,
    )
    real = stand_in(device)
    selected = select(settings, registry, wanted)
    ops, selections = bind(selected, registry, quarantine=quarantine, real=real)
    model = Llama(architecture, ops)
    writer.load(model)
    model.to(torch.device(real.type), getattr(torch, precision.compute))
    tokens = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=writer.ends,
    )
    text = Detokenizer(tokenizer, ids)
    print(text.add(), end="", flush=True)
    with breadcrumb(quarantine, [(s.chosen, tried_on(s.requests, real)) for s in selections]):
        for token in tokens:
            print(text.add(token), end="", flush=True)
    print(text.end())


def refuse_prompt_bytes(prompt: str) -> None:
    """Raises: ConfigError for bytes on the command line that are not text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        byte = ord(prompt[error.start]) & 0xFF
        raise ConfigError(
            f"--prompt is not UTF-8: after {error.start} characters comes the byte 0x{byte:02x}. "
            "Give it in UTF-8."
        ) from None


def _precision(wanted: str, device: Device) -> Precision:
    """That of the training, or of config.json, where this device supports it."""
    try:
        return choose_precision(wanted, [device])
    except ConfigError:
        found = choose_precision("auto", [device])
        log.warning(
            "The model is in %s, which %s does not support; computing in %s.",
            *(wanted, device, found.compute),
        )
        return found
