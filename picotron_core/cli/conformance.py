"""`picotron conformance`: the suite's own commands, called by name, not imported."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

COMMANDS = "picotron_conformance.commands"


def run_conformance(words: Sequence[str], *, html: Path | None, markdown: bool) -> int:
    code: int = importlib.import_module(COMMANDS).run(words, html=html, markdown=markdown)
    return code
