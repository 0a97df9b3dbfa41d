"""Who serves which op: a pure function of the wishes, the requests and what is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

from picotron_core.config import Rule
from picotron_core.errors import BackendError, did_you_mean
from picotron_core.ops import OPS
from picotron_core.registry.types import (
    Candidate,
    Code,
    Level,
    Reason,
    Request,
    Selection,
    Verdict,
    normalise,
)

AUTO = "auto"
Installed = Callable[[str], str | None]  # a distribution's version, or None


def installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def plugins_named(rules: Iterable[Rule]) -> list[str]:
    """The plugins whose backends are asked for by qualified name: naming one enables it."""
    qualified = (name for rule in rules for name in rule.names if "/" in name)
    plugins = (name.split("/")[0] for name in qualified)
    return [plugin for plugin in plugins if normalise(plugin) != "picotron"]


def resolve(
    rules: Sequence[Rule],
    requests: Sequence[Request],
    candidates: Sequence[Candidate],
    *,
    inactive: Sequence[str] = (),
    installed: Installed = installed_version,
) -> dict[str, Selection]:
    """Select a backend for every op that is requested.

    Args:
        rules: wishes, the strongest source first.
        requests: all that the run will ask; a backend must serve every request of its op.
        candidates: what is declared.
        inactive: plugins that are installed but not enabled, for the error messages.
        installed: the version of a distribution, for `Backend.requires`.

    Raises: BackendError for an unknown op or backend, and where nothing can serve.
    """
    check_rules(rules, candidates, inactive)
    by_op = {op: [r for r in requests if r.op == op] for op in OPS}
    return {
        op: _select(op, tuple(asked), rules, candidates, installed)
        for op, asked in by_op.items()
        if asked
    }


def judge(candidate: Candidate, requests: Iterable[Request], installed: Installed) -> Verdict:
    """One backend's answer to all requests of its op."""
    backend = candidate.backend
    reasons: list[Reason] = []
    level = max(Level)
    try:
        reasons += _missing_requirements(backend.requires, installed)
        for request in requests:
            for reason in backend.supports(request):
                if not isinstance(reason, Reason):
                    raise TypeError(f"supports must return Reasons, not {reason!r}")
                if reason not in reasons:
                    reasons.append(reason)
            rank = backend.level if isinstance(backend.level, Level) else backend.level(request)
            level = Level(min(level, rank))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a faulty declaration rules out its backend alone
        detail = f"its declaration raised {type(error).__name__}: {error}"
        fix = f"Report it to {candidate.provider.distribution}"
        reasons.append(Reason(code=Code.DECLARATION, detail=detail, fix=fix))
    return Verdict(candidate=candidate, level=level, reasons=tuple(reasons))


def rank(verdict: Verdict) -> tuple[int, bool, str]:
    """The order of `auto`: highest level, then bundled, then name; never load order."""
    candidate = verdict.candidate
    return -verdict.level, not candidate.provider.bundled, normalise(candidate.backend.name)


def _select(
    op: str,
    requests: tuple[Request, ...],
    rules: Sequence[Rule],
    candidates: Sequence[Candidate],
    installed: Installed,
) -> Selection:
    mine = [candidate for candidate in candidates if candidate.backend.op == op]
    asked, source = _wish(op, rules, mine)
    verdicts = sorted((judge(c, requests, installed) for c in mine), key=rank)
    ordered: list[Verdict] = []
    for name in asked:
        matches = (v for v in verdicts if name == AUTO or is_called(v.candidate, name))
        ordered += [verdict for verdict in matches if verdict not in ordered]
    able = [verdict.candidate for verdict in ordered if not verdict.reasons]
    refused = tuple(verdict for verdict in ordered if verdict.reasons)
    if not able:
        raise BackendError(_nobody(op, requests[0], asked, source, refused))
    return Selection(
        op=op,
        requests=requests,
        asked=asked,
        source=source,
        chosen=able[0],
        runners_up=tuple(able[1:]),
        refused=refused,
    )


def _wish(op: str, rules: Sequence[Rule], mine: Sequence[Candidate]) -> tuple[tuple[str, ...], str]:
    """The names asked for and by whom: within a source, the op's own rule, a bare name, then *."""
    for source in dict.fromkeys(rule.source for rule in rules):
        by_op: Mapping[str, Rule] = {r.op: r for r in rules if r.source == source}
        if op in by_op:
            return by_op[op].names, source
        if "" in by_op:
            bare = by_op[""].names
            names = tuple(n for n in bare if n == AUTO or any(is_called(c, n) for c in mine))
            if names:
                return names, source
        if "*" in by_op:
            return by_op["*"].names, source
    return (AUTO,), AUTO


def is_called(candidate: Candidate, name: str) -> bool:
    """Whether `name`, qualified or not, means this backend."""
    plugin, slash, bare = name.rpartition("/")
    if slash and normalise(plugin) != normalise(candidate.provider.plugin):
        return False
    return normalise(bare) == normalise(candidate.backend.name)


def check_rules(
    rules: Sequence[Rule], candidates: Sequence[Candidate], inactive: Sequence[str]
) -> None:
    """Raise BackendError where a rule names an op or a backend that nobody declares."""
    for rule in rules:
        if rule.op not in ("", "*", *OPS):
            raise BackendError(
                f"Backends from the {rule.source}: unknown op {rule.op!r}. "
                + did_you_mean(rule.op, OPS)
            )
        for op in OPS if rule.op == "*" else (rule.op,):
            mine = [c for c in candidates if not op or c.backend.op == op]
            for name in rule.names:
                if name != AUTO and not any(is_called(c, name) for c in mine):
                    raise BackendError(_unknown(op, name, rule, mine, candidates, inactive))


def _unknown(
    op: str,
    name: str,
    rule: Rule,
    mine: Sequence[Candidate],
    candidates: Sequence[Candidate],
    inactive: Sequence[str],
) -> str:
    ops = sorted({c.backend.op for c in candidates if is_called(c, name)})
    qualified = "/" in name
    near = {c.qualified_name if qualified else c.backend.name for c in mine} | {AUTO}
    hint = did_you_mean(name, near)
    if ops:
        hint = f"{name!r} has: {', '.join(ops)}. {hint}"
        if rule.op == "*":
            hint += f" A bare {name} takes it for just the ops that it has."
    if inactive:
        hint += f" Installed but not enabled: {', '.join(inactive)} (PICOTRON_PLUGINS=name)."
    whose = f" for op {op!r}" if op else ""
    return f"Backends from the {rule.source}: no backend {name!r}{whose}. {hint}"


def _missing_requirements(requires: Sequence[str], installed: Installed) -> list[Reason]:
    reasons = []
    for text in requires:
        requirement = Requirement(text)
        found = installed(requirement.name)
        if found is None:
            code, detail = Code.NOT_INSTALLED, f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            code, detail = Code.VERSION, f"needs {text}, found {found}"
        else:
            continue
        reasons.append(Reason(code=code, detail=detail, fix=f"pip install '{text}'"))
    return reasons


def _nobody(
    op: str, request: Request, asked: tuple[str, ...], source: str, refused: Sequence[Verdict]
) -> str:
    why = "\n  ".join(
        f"{verdict.candidate.qualified_name}: {'; '.join(map(str, verdict.reasons))}"
        for verdict in refused
    )
    wanted = f"op {op!r} ({request.dtype}, on {request.device})"
    if len(asked) == 1 and AUTO not in asked:
        why = why.split(": ", 1)[-1]
        return (
            f"Backend {asked[0]!r}, from the {source}, cannot run {wanted}: {why}. "
            f"Take another with --backends {op}=auto."
        )
    return f"No backend of {', '.join(asked)} can run {wanted}:\n  {why}"
