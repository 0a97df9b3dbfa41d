"""The child of `trial`: imports a plugin, probes its kernels, and answers line by line."""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any


def main() -> None:
    question = json.loads(sys.stdin.read())
    # What the plugin prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:] = question["path"]
    _no_core_dump()

    import torch  # before the clock of the plugin starts

    from picotron_core.registry.plugins import load_registry
    from picotron_core.registry.trial import IMPORT

    if torch.cuda.is_available():
        torch.cuda.set_device(question["index"])

    _tell(answers, begin=IMPORT)
    registry = load_registry([question["plugin"]])
    failed = next((record.error for record in registry.failed()), "")
    if not failed and not question["tasks"]:
        _hear(registry)
    _tell(answers, answer=failed)
    if not failed:
        for place, task in enumerate(question["tasks"]):
            _tell(answers, begin=str(place))
            _tell(answers, answer=_probe(task, registry.candidates))
    answers.close()
    os._exit(0)  # what a plugin does at exit is not asked


def _hear(registry: Any) -> None:
    """Call what the host will call in its own process: it may die of a declaration as well."""
    from picotron_core.hardware import look
    from picotron_core.registry.plugins import described_device
    from picotron_core.registry.select import installed_version, judge
    from picotron_core.registry.types import Request

    described = described_device(registry)
    for device in {described or look(), look("cpu")}:
        for candidate in registry.candidates:
            if not candidate.provider.bundled:
                for dtype in ("float32", "float16", "bfloat16"):
                    request = Request(op=candidate.backend.op, device=device, dtype=dtype)
                    judge(candidate, [request], installed_version)


def _tell(answers: IO[str], **event: str) -> None:
    answers.write(json.dumps(event) + "\n")
    answers.flush()


def _probe(task: dict[str, Any], candidates: Any) -> str:
    from picotron_core.registry.probe import probe, reference_for
    from picotron_core.registry.trial import request_of

    mine = next(
        candidate
        for candidate in candidates
        if (candidate.backend.op, candidate.qualified_name) == (task["op"], task["backend"])
    )
    try:
        kernel = mine.backend.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it rules out this kernel alone
        return f"loading it raised {type(error).__name__}: {error}"
    reference = reference_for(task["op"], candidates)
    if reference is None:
        return ""
    for record in task["requests"]:
        reason = probe(kernel, reference.backend.load(), request_of(record))
        if reason is not None:
            return reason.detail
    return ""


def _no_core_dump() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
