"""`picotron generate`: continue a prompt with the weights of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from picotron_core.checkpoint.load import Checkpoint, find_checkpoint, load_weights_only
from picotron_core.cli.model import architecture_of
from picotron_core.cli.selection import find_device, open_quarantine, open_registry, select
from picotron_core.config import Settings
from picotron_core.data.tokenizer import open_tokenizer
from picotron_core.engine.generate import generate
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError
from picotron_core.hardware import Device, stand_in
from picotron_core.model.llama import Llama
from picotron_core.model.requests import requests
from picotron_core.precision import Precision, choose_precision
from picotron_core.registry.bind import bind, tried_on
from picotron_core.registry.breadcrumb import breadcrumb

SAMPLE_TOKENS = 200
log = logging.getLogger("picotron")


def open_run(path: Path) -> tuple[RunDirectory, Checkpoint]:
    """A run's folder (or one of its checkpoints) -> the run and its checkpoint."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{path} is no run (no config.toml). `ls runs` shows what there is.")
    return RunDirectory(run), find_checkpoint(path)


def write_text(
    settings: Settings,
    run: RunDirectory,
    checkpoint: Checkpoint,
    *,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Print the prompt and its continuation, as it is written.

    Args:
        max_new_tokens: None means SAMPLE_TOKENS, or as many as the model's context still holds.
    """
    config = settings.config
    tokenizer = open_tokenizer(run.tokenizer, eos_id=checkpoint.manifest.facts.eos_id)
    architecture = architecture_of(config, tokenizer.vocab_size)
    quarantine = open_quarantine(settings)
    registry = open_registry(settings, quarantine)
    device = find_device(settings, registry)
    precision = _precision(config.train.dtype, device)
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
    load_weights_only(dict(model.named_parameters()), checkpoint)
    model.to(torch.device(real.type), getattr(torch, precision.compute))

    # A prompt of nothing continues the end of a document: what the model saw before each one.
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    if max_new_tokens is None:
        room = architecture.max_position_embeddings - len(ids)
        max_new_tokens = max(1, min(SAMPLE_TOKENS, room))
    written: list[int] = []
    shown = ""
    print(prompt, end="", flush=True)
    tokens = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    with breadcrumb(quarantine, [(s.chosen, tried_on(s.requests, real)) for s in selections]):
        for token in tokens:
            written.append(token)
            # Decode all that was written: one character may be spread over several tokens.
            text = tokenizer.decode(written)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                continue
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def _precision(trained: str, device: Device) -> Precision:
    """That of the training, where this device has it."""
    try:
        return choose_precision(trained, [device])
    except ConfigError:
        found = choose_precision("auto", [device])
        log.warning(
            "trained in %s, which %s has not: computing in %s", trained, device, found.compute
        )
        return found
