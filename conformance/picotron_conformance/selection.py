"""Which backends the options name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from picotron_core.config import Rule, parse_backends
from picotron_core.errors import BackendError
from picotron_core.ops import OPS
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.select import check_rules, is_called, plugins_named
from picotron_core.registry.types import Candidate, normalise

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The backends to prove, op by op. named: those asked for by name ("norm=acme/fast")."""

    candidates: tuple[Candidate, ...]
    named: tuple[str, ...]


def choose(wishes: Sequence[str]) -> Chosen:
    """Read `op=name`, a bare name for all of its ops, or `all` for every bundled backend.

    Raises: ConfigError for what cannot be read, an unknown op or backend, a plugin that is not
        installed or that fails to load.
    """
    rules = [
        rule
        for wish in wishes
        if normalise(wish) != ALL
        for rule in parse_backends(wish, "command line")
    ]
    registry = load_registry(plugins_named(rules))
    for op in (name for rule in rules if not rule.op for name in rule.names if name in OPS):
        names = [c.backend.name for c in registry.candidates if c.backend.op == op]
        raise BackendError(f"{op!r} is an op: write {op}=NAME, with one of {', '.join(names)}.")
    for failed in registry.failed():
        raise BackendError(
            f"Plugin {failed.provider.plugin!r} failed to load: {failed.error}.\n{failed.traceback}"
        )
    inactive = [p.provider.plugin for p in registry.plugins if p.status == "inactive"]
    check_rules(rules, registry.candidates, inactive)
    named = [c for c in registry.candidates if any(_names(rule, c) for rule in rules)]
    everything = any(normalise(wish) == ALL for wish in wishes)
    chosen = [c for c in registry.candidates if c in named or (everything and c.provider.bundled)]
    # Op by op: backends of one op are judged by the same golden results, which are kept a while.
    ops = list(dict.fromkeys(candidate.backend.op for candidate in chosen))
    return Chosen(
        candidates=tuple(sorted(chosen, key=lambda c: ops.index(c.backend.op))),
        named=tuple(f"{c.backend.op}={c.qualified_name}" for c in named),
    )


def _names(rule: Rule, candidate: Candidate) -> bool:
    if rule.op not in ("", "*", candidate.backend.op):
        return False
    return any(is_called(candidate, name) for name in rule.names)
