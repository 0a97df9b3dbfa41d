"""What was answered, by check. One that is asked again keeps its worst answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from picotron_conformance.check import Outcome, Verdict

# A wrong result is wrong, however often it comes out right; a pass is what is left.
WORST_FIRST = (
    *(Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT),
    *(Verdict.NOT_RUN, Verdict.UNSUPPORTED, Verdict.PASS),
)


@dataclass(slots=True)
class Answers:
    """Reruns, repeats and several workers may all answer one check: none may talk over another."""

    worst: dict[str, Outcome] = field(default_factory=dict)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)  # each once, as they came

    def add(self, outcome: Outcome) -> None:
        held = self.worst.setdefault(outcome.id, outcome)
        if WORST_FIRST.index(outcome.verdict) < WORST_FIRST.index(held.verdict):
            self.worst[outcome.id] = outcome
        verdicts = self.verdicts.setdefault(outcome.id, [])
        if outcome.verdict not in verdicts:
            verdicts.append(outcome.verdict)

    def contradictions(self) -> Iterator[str]:
        """Checks that were answered more than once, and not alike."""
        for id, verdicts in self.verdicts.items():
            if len(verdicts) > 1:
                yield (
                    f"{id} was asked more than once and answered {', then '.join(verdicts)}. "
                    "Run each check once: without reruns, and without --dist each."
                )
