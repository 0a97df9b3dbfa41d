"""From settings to bound kernels, as every command does it, and how a selection is shown."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from picotron_core.config import Settings
from picotron_core.data.cache_folder import own_folder
from picotron_core.errors import BackendError, ConfigError
from picotron_core.hardware import Device, find, refuse_without_kernels, stand_in
from picotron_core.model.architecture import Architecture
from picotron_core.model.requests import requests
from picotron_core.parallel.tensor import refuse_tensor_parallel, slice_of
from picotron_core.registry import Request, Selection, normalise
from picotron_core.registry.breadcrumb import sweep
from picotron_core.registry.plugins import (
    PluginRecord,
    Registry,
    described_device,
    load_registry,
)
from picotron_core.registry.quarantine import Agree, Quarantine
from picotron_core.registry.select import plugins_named, resolve

log = logging.getLogger("picotron")


def open_quarantine(
    settings: Settings, agree: Agree = lambda what, mine: mine, local_rank: int = 0
) -> Quarantine:
    """Where plugins are tried, after what former runs left there was judged."""
    folder = own_folder(Path(settings.config.data.cache_dir).expanduser(), "trials")
    quarantine = Quarantine(folder, agree, index=local_rank)
    for sentence in sweep(quarantine):
        log.warning("%s", sentence)
    return quarantine


def open_registry(settings: Settings, quarantine: Quarantine) -> Registry:
    """The registry with the plugins that the settings enable or name, each tried in a child first.

    Raises: BackendError where one that is named cannot be used.
    """
    named = plugins_named(settings.rules)
    enabled = [*settings.config.plugins.enable, *named]
    registry = load_registry(enabled, evidence_against=quarantine.plugin)
    for failed in registry.failed():
        plugin = failed.provider.plugin
        if normalise(plugin) in map(normalise, named):
            raise BackendError(
                f"A backend of plugin {plugin!r} is asked for, but it {_what_became(failed)}. "
                f"Reinstall {failed.provider.distribution}, or choose another."
            )
        log.warning("plugin %s %s", plugin, _what_became(failed))
    return registry


def _what_became(record: PluginRecord) -> str:
    if record.status == "failed":
        return f"failed to load: {record.error}"
    return (
        f"is quarantined: {record.error} "
        f"(`picotron quarantine clear {record.provider.plugin}` has it tried again)"
    )


def find_device(settings: Settings, registry: Registry, local_rank: int = 0) -> Device:
    """The device of this process: a plugin's description, else a real look or a profile.

    Raises: ConfigError where it is not there, or the installed torch has no kernels for it.
    """
    wish = settings.config.run.device
    described = described_device(registry) if wish == "auto" else None
    device = described or find(wish, local_rank)
    refuse_without_kernels(device)
    return device


def select(
    settings: Settings, registry: Registry, wanted: Sequence[Request]
) -> dict[str, Selection]:
    inactive = [p.provider.plugin for p in registry.plugins if p.status == "inactive"]
    return resolve(settings.rules, wanted, registry.candidates, inactive=inactive)


def training_requests(
    settings: Settings, architecture: Architecture, device: Device, dtype: str, world_size: int
) -> list[Request]:
    """What this run asks of each op.

    Raises: ConfigError for what the settings ask and no kernel of this run could keep.
    """
    data, tp = settings.config.data, settings.config.parallel.tp
    if data.seq_len > architecture.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len = {data.seq_len} is longer than model.max_position_embeddings = "
            f"{architecture.max_position_embeddings}. Lower the one or raise the other."
        )
    refuse_tensor_parallel(architecture, tp)
    asked = requests(
        slice_of(architecture, tp),
        device=device,
        dtype=dtype,
        seq_len=data.seq_len,
        context=settings.config.parallel.cp,
        micro_batch=settings.config.train.micro_batch,
        document_mask=data.document_mask,
        training=True,
        world_size=world_size,
        network=stand_in(device),
    )
    if tp == 1:
        return asked
    for rule in settings.rules:
        if rule.op == "loss" and "auto" not in rule.names:
            raise ConfigError(
                f"loss={','.join(rule.names)} is asked for ({rule.source}), but parallel.tp = {tp} "
                "divides the vocabulary, which has a loss of its own. Use --backends loss=auto, or "
                "--parallel.tp 1."
            )
    return [r for r in asked if r.op != "loss"]  # parallel/vocabulary.py


def selection_table(selections: Sequence[Selection]) -> Table:
    """A line per op: who serves it, who decided, and who was refused."""
    table = Table("op", "backend", "decided by", "refused", box=None, header_style="bold")
    for selection in selections:
        refused = (
            f"{verdict.candidate.backend.name}: {verdict.reasons[0].detail}"
            for verdict in selection.refused
        )
        table.add_row(
            selection.op,
            selection.chosen.qualified_name,
            selection.source,
            escape("\n".join(refused)),
        )
    return table
