"""Configs as they are when the job is submitted: checked now, and an edit later changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tomli_w

from picotron_core.cli.model import draft_of, replicas_of
from picotron_core.config import Rule, Settings
from picotron_core.errors import ConfigError
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import check_rules, plugins_named


def check(settings: Settings, *, world_size: int, gpus: bool) -> None:
    """Refuse what would only fail after hours in the queue.

    Raises: ConfigError for degrees that the model or the number of ranks does not allow, for a
        backend that nobody has, for a device that the nodes were not asked to have.
    """
    config = settings.config
    replicas_of(config, draft_of(config), world_size)
    if config.run.device == "cuda" and not gpus:
        raise ConfigError(
            "run.device = 'cuda', but the job has no GPUs: ask for them with --gpus-per-node N."
        )
    if config.run.device == "cpu" and gpus:
        raise ConfigError(
            "run.device = 'cpu', but --gpus-per-node asks for GPUs: give --ranks-per-node N "
            "instead, or leave out run.device."
        )
    if not config.plugins.enable and not plugins_named(settings.rules):
        check_rules(settings.rules, load_registry().candidates, [])  # others' need their machine


def frozen(settings: Settings, run: Path) -> str:
    """The config of a job's task, as TOML: its run is fixed, and is gone on with at every start."""
    config = settings.config
    where = config.run.model_copy(update={"dir": str(run.parent), "name": run.name, "resume": True})
    values = config.model_copy(update={"run": where}).model_dump(exclude_none=True)
    values["backends"] = backends_from("file", settings.rules)
    return tomli_w.dumps(values)


def backends_from(source: str, rules: Iterable[Rule]) -> str:
    """What one source said of backends, in the grammar of `--backends`."""
    said = (rule for rule in rules if rule.source == source)
    return ";".join(f"{rule.op}{'=' * bool(rule.op)}{','.join(rule.names)}" for rule in said)
