"""Finding plugins and hearing what they declare, each one alone so that none can hurt another."""

from __future__ import annotations

import importlib
import logging
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, Literal

import pluggy

from picotron_core.errors import BackendError, ConfigError, did_you_mean
from picotron_core.hardware import Device
from picotron_core.ops import OPS
from picotron_core.registry import hookspecs
from picotron_core.registry.types import Backend, Candidate, Provider, normalise

log = logging.getLogger("picotron")

# Names, not imports: core stands below the backends, and they load like any other plugin.
BUNDLED = (
    "picotron_backends.naive_math",
    "picotron_backends.sdpa",
    "picotron_backends.mem_efficient",
    "picotron_backends.torch_fused",
    "picotron_backends.local",
    "picotron_backends.gloo_cpu",
    "picotron_backends.nccl",
)
GROUP = "picotron"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRecord:
    """What became of one plugin."""

    provider: Provider
    status: Literal["active", "inactive", "failed", "quarantined"]
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Registry:
    """What is declared on this machine. Made once at start-up by `load_registry`."""

    candidates: tuple[Candidate, ...]
    plugins: tuple[PluginRecord, ...]
    manager: pluggy.PluginManager = field(repr=False)

    def failed(self) -> Iterator[PluginRecord]:
        """Those that were enabled and cannot be used."""
        return (record for record in self.plugins if record.status in ("failed", "quarantined"))


def load_registry(
    enable: Collection[str] = (), *, evidence_against: Callable[[EntryPoint], str] | None = None
) -> Registry:
    """Load the bundled backends and the enabled plugins; list the others without importing them.

    Args:
        enable: plugin names (entry-point names of the group `picotron`).
        evidence_against: asked before a plugin is imported; one with any is not.

    Raises: ConfigError for a name that is not installed; BackendError where two backends claim one
        (op, name). A plugin that fails to load is a record, not an error.
    """
    manager = pluggy.PluginManager("picotron")
    manager.add_hookspecs(hookspecs)
    installed = _installed()
    wanted = {normalise(name): name for name in enable}
    for name in wanted.keys() - {normalise(point.name) for point in installed}:
        raise ConfigError(_not_installed(wanted[name], [point.name for point in installed]))

    named = [point for point in installed if normalise(point.name) in wanted]
    _refuse_same_plugin_names(named)
    candidates: list[Candidate] = []
    records: list[PluginRecord] = []
    for module in BUNDLED:
        manager.register(importlib.import_module(module), name=module)
        candidates += _declared(manager, module, _bundled())
    for point in installed:
        provider = _provider(point)
        if normalise(point.name) not in wanted:
            records.append(PluginRecord(provider=provider, status="inactive"))
            continue
        if evidence_against and (evidence := evidence_against(point)):
            records.append(PluginRecord(provider=provider, status="quarantined", error=evidence))
            continue
        record, declared = _load_plugin(manager, point, provider)
        records.append(record)
        candidates += declared
    _refuse_conflicts(candidates)
    return Registry(tuple(candidates), tuple(records), manager)


def described_device(registry: Registry) -> Device | None:
    """The device as a plugin describes it, or None where no plugin does."""
    for implementation in registry.manager.hook.picotron_device.get_hookimpls():
        try:
            device: object = implementation.function()
        except (Exception, SystemExit):
            log.warning("picotron_device of %s failed", implementation.plugin_name, exc_info=True)
            continue
        if isinstance(device, Device):
            return device
    return None


def notify(registry: Registry, hook: str, **arguments: Any) -> None:
    """Call an observing hook of every plugin. One that raises is logged; the host goes on."""
    for implementation in getattr(registry.manager.hook, hook).get_hookimpls():
        try:
            implementation.function(*(arguments[name] for name in implementation.argnames))
        except (Exception, SystemExit):
            log.warning("%s of %s failed", hook, implementation.plugin_name, exc_info=True)


@cache
def _bundled() -> Provider:
    return Provider(
        plugin="picotron", distribution="picotron", version=version("picotron"), bundled=True
    )


def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _provider(point: EntryPoint) -> Provider:
    return Provider(
        plugin=point.name,
        distribution=point.dist.name if point.dist else "unknown",
        version=point.dist.version if point.dist else "unknown",
    )


def _not_installed(name: str, installed: list[str]) -> str:
    hint = did_you_mean(name, installed) if installed else "No plugin is installed."
    return f"Plugin {name!r} is not installed. {hint} `picotron backends` lists what is."


def _load_plugin(
    manager: pluggy.PluginManager, point: EntryPoint, provider: Provider
) -> tuple[PluginRecord, list[Candidate]]:
    """Import one plugin and hear its declarations; whatever it raises becomes its record."""
    try:
        manager.register(point.load(), name=point.name)
        declared = _declared(manager, point.name, provider)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - one bad plugin must hurt nobody
        if manager.has_plugin(point.name):
            manager.unregister(name=point.name)
        record = PluginRecord(
            provider=provider,
            status="failed",
            error=f"{type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
        )
        return record, []
    return PluginRecord(provider=provider, status="active"), declared


def _declared(manager: pluggy.PluginManager, plugin: str, provider: Provider) -> list[Candidate]:
    """What one plugin's `picotron_backends` yields, every record checked."""
    candidates = []
    for implementation in manager.hook.picotron_backends.get_hookimpls():
        if implementation.plugin_name != plugin:
            continue
        declared: Iterable[Any] = implementation.function()  # type: ignore[assignment]
        for backend in declared:
            if not isinstance(backend, Backend):
                raise TypeError(f"picotron_backends must yield Backend, got {backend!r}")
            if backend.op not in OPS:
                raise ValueError(
                    f"backend {backend.name!r} names op {backend.op!r}. "
                    + did_you_mean(backend.op, OPS)
                )
            if "/" in backend.name or normalise(backend.name) == "auto":
                raise ValueError(f"backend name {backend.name!r} is reserved for selection")
            candidates.append(Candidate(backend=backend, provider=provider))
    return candidates


def _refuse_same_plugin_names(points: list[EntryPoint]) -> None:
    seen: dict[str, EntryPoint] = {}
    for point in points:
        other = seen.setdefault(normalise(point.name), point)
        if other is not point:
            raise BackendError(
                f"Two distributions call their plugin {point.name!r}: "
                f"{_provider(other).distribution} and {_provider(point).distribution}. "
                "Uninstall one of the two."
            )


def _refuse_conflicts(candidates: list[Candidate]) -> None:
    seen: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        key = (candidate.backend.op, normalise(candidate.backend.name))
        other = seen.setdefault(key, candidate)
        if other is not candidate:
            raise BackendError(
                f"Two backends are called {candidate.backend.name!r} for op {key[0]!r}: one from "
                f"{other.provider.distribution}, one from {candidate.provider.distribution}. "
                "Disable or uninstall one of the two."
            )
