"""The declaration itself, and the errors that a contract demands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from packaging.requirements import InvalidRequirement, Requirement

from picotron_conformance.cases import DTYPES, PLAIN_SIZES
from picotron_conformance.check import (
    Check,
    Profile,
    Record,
    Target,
    UndecidedError,
    Verdict,
    WrongKernelError,
)
from picotron_core.hardware import PROFILES, Device
from picotron_core.ops.attention import FEATURES
from picotron_core.registry.plugins import BUNDLED, GROUP
from picotron_core.registry.types import Backend, Level, Reason, Request

HEAVY = ("torch", "numpy", "transformers", "triton", "jax")


def checks(op: str, device: Device, profile: Profile, seed: int) -> Iterator[Check]:
    ask = partial(Check, op=op, case="", dtype="", aspect="refusals")
    yield ask(name="declaration", run=declaration)
    if op == "attention":
        yield ask(name="contract-errors", run=contract_errors)


def declaration(target: Target, record: Record) -> None:
    """`supports` and `level` answer for any card, always alike, and importing them is light."""
    backend = target.candidate.backend
    for request in _requests(backend.op):
        reasons = _reasons(backend, request)
        if reasons != _reasons(backend, request):
            raise WrongKernelError(f"supports answers differently when asked again: {request}")
        level = backend.level if isinstance(backend.level, Level) else backend.level(request)
        if not isinstance(level, Level):
            raise WrongKernelError(f"level must be a Level, not {level!r}, for {request}")
    for text in backend.requires:
        try:
            Requirement(text)
        except InvalidRequirement as error:
            raise WrongKernelError(f"requires: {text!r} is no requirement: {error}") from None
    provider = target.candidate.provider
    plugin = "" if provider.bundled else provider.plugin
    heavy = _imported_by_declaring(plugin, backend.op, backend.name)
    if heavy:
        raise WrongKernelError(
            f"declaring imports {', '.join(heavy)}",
            hint="an import at the top of the declaring module: let `load` import, by kernel_from",
        )


def _reasons(backend: Backend, request: Request) -> Sequence[Reason]:
    reasons = backend.supports(request)
    if not isinstance(reasons, Sequence) or isinstance(reasons, str):
        raise WrongKernelError(f"supports must return a sequence of Reasons, not {reasons!r}")
    for reason in reasons:
        if not isinstance(reason, Reason) or not reason.detail.strip():
            raise WrongKernelError(f"supports gives no reason that says anything: {reason!r}")
    return reasons


def _requests(op: str) -> Iterator[Request]:
    """A plain request and one for each feature, for every card, dtype and use."""
    asked: list[frozenset[str]] = [frozenset()]
    if op == "attention":
        asked += [frozenset({"causal", feature}) for feature in FEATURES]
    for device, dtype, training, features in product(
        PROFILES.values(), (*DTYPES, "float64"), (True, False), asked
    ):
        yield Request(
            op=op,
            device=device,
            dtype=dtype,
            training=training,
            features=features,
            sizes=PLAIN_SIZES[op],
        )


def _imported_by_declaring(plugin: str, op: str, name: str) -> tuple[str, ...]:
    """The heavy modules that a process holds once it has heard a plugin, "" for the bundled, and
    asked one of its backends.
    """
    declared = (
        f"map(import_module, {BUNDLED!r})"
        if not plugin
        else f"[p.load() for p in entry_points(group={GROUP!r}) if p.name == {plugin!r}]"
    )
    script = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
        "from importlib import import_module\n"
        "from importlib.metadata import entry_points\n"
        "from picotron_core.hardware import profile\n"
        "from picotron_core.registry.types import Request\n"
        f"sizes = {PLAIN_SIZES[op]!r}\n"
        f"for backend in [b for p in {declared} for b in p.picotron_backends()]:\n"
        f"    if (backend.op, backend.name) != ({op!r}, {name!r}): continue\n"
        "    request = Request(\n"
        "        op=backend.op, device=profile('cpu'), dtype='float32', sizes=sizes\n"
        "    )\n"
        "    backend.supports(request), getattr(backend.level, '__call__', id)(request)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    command = [sys.executable, "-c", script, json.dumps(sys.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WrongKernelError(f"declaring fails in a new process: {result.stderr.strip()[-400:]}")
    return tuple(json.loads(result.stdout.splitlines()[-1]))


def contract_errors(target: Target, record: Record) -> None:
    """What the contract forbids is a ValueError, not a number."""
    q = torch.ones(2, 4, 5, 8, device=target.device)
    k, three = q[:, :2], q[:, :3]
    ids = torch.zeros(2, 5, dtype=torch.long, device=target.device)
    wrong: dict[str, tuple[set[str], dict[str, Any]]] = {
        "window=0": ({"causal", "window", "gqa"}, {"causal": True, "window": 0}),
        "window=-1": ({"causal", "window", "gqa"}, {"causal": True, "window": -1}),
        "a window without causal": ({"window", "gqa"}, {"causal": False, "window": 2}),
        "doc_ids for more keys": ({"doc_ids", "gqa"}, {"causal": False, "doc_ids": ids[:, :4]}),
        "doc_ids for fewer rows": ({"doc_ids", "gqa"}, {"causal": False, "doc_ids": ids[:1]}),
        "doc_ids with T > S": (
            {"doc_ids", "gqa", "cross_length"},
            {"causal": False, "doc_ids": ids[:, :4], "k": k[:, :, :4]},
        ),
        "K=3 heads for H=4": ({"causal", "gqa"}, {"causal": True, "k": three}),
        "query_doc_ids for fewer rows": (
            {"doc_ids", "query_doc_ids", "gqa"},
            {"causal": False, "doc_ids": ids, "query_doc_ids": ids[:1]},
        ),
        "query_doc_ids for fewer queries": (
            {"doc_ids", "query_doc_ids", "gqa"},
            {"causal": False, "doc_ids": ids, "query_doc_ids": ids[:, :4]},
        ),
        "query_doc_ids without doc_ids": (
            {"query_doc_ids", "gqa"},
            {"causal": False, "query_doc_ids": ids},
        ),
        "doc_ids and a query before the keys": (
            {"doc_ids", "offset", "gqa"},
            {"causal": False, "doc_ids": ids, "offset": -1},
        ),
        "doc_ids and a query beyond the keys": (
            {"doc_ids", "offset", "gqa"},
            {"causal": False, "doc_ids": ids, "offset": 1},
        ),
    }
    asked = 0
    for what, (features, arguments) in wrong.items():
        request = Request(
            op="attention",
            device=target.hardware,
            dtype="float32",
            training=False,
            features=frozenset(features),
            sizes={"B": 2, "H": 4, "K": 2, "T": 5, "S": 5, "D": 8},
        )
        if target.candidate.backend.supports(request):
            continue
        asked += 1
        keys = arguments.pop("k", k)
        try:
            target.kernel(q, keys, keys, **arguments)
        except ValueError:
            continue
        raise WrongKernelError(
            f"{what} gives a result, must be a ValueError",
            hint="picotron_core.ops.attention.check_arguments raises what the contract demands",
        )
    if not asked:
        raise UndecidedError(Verdict.UNSUPPORTED, "it claims none of what could be asked wrongly")
