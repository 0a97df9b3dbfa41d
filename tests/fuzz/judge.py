"""What is wrong with how a command ended, whatever it was asked."""

from __future__ import annotations

import re

from commands import Outcome

CRASHES = ("Traceback (most recent call last)", "Fatal Python error", "terminate called")
STOPPED = (75, 130)  # asked to stop: saved, or nothing to save yet


def fault(outcome: Outcome, *, reports: bool = False) -> str | None:
    """A sentence, or None.

    Args:
        reports: the command fails by what it reports, without an error of its own.
    """
    for crash in CRASHES:
        if crash in outcome.said:
            return f"it printed {crash!r}"
    if outcome.code is None:
        return "it hung"
    if outcome.code < 0:
        return f"signal {-outcome.code} ended it"
    if outcome.code == 0 or (outcome.was_asked_to_stop and outcome.code in STOPPED):
        return None
    if not error_line(outcome) and not reports:
        return f"it ended with {outcome.code} and no line 'error: '"
    return None


def error_line(outcome: Outcome) -> str:
    """The error that it ended with: ours, or that of the command line's parser."""
    found = re.search(r"^(error: .+|Error: .+|Usage: .+)$", outcome.err, re.MULTILINE)
    return found[0] if found else ""
