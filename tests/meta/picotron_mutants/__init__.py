"""Small wrong kernels, each with the check that must kill it: a plugin, declared without torch.

With this folder's parent on PYTHONPATH, any of them is asked by the ordinary command:

    pytest --pyargs picotron_conformance --picotron-backend norm=mutants/eps_dropped
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from picotron_core.registry import Backend, Level, Reason, Request, hookimpl, kernel_from


@dataclass(frozen=True, slots=True)
class Mutant:
    """A wrong kernel at `picotron_mutants.<op>:<name>`.

    killed_by: the family of checks that must fail it.
    what: what it does wrong.
    slow: only the full profile has a case that is large enough.
    claims: fields of its `Backend`, where what it claims is what is wrong.
    """

    op: str
    name: str
    killed_by: str
    what: str
    slow: bool = False
    claims: Mapping[str, Any] = field(default_factory=dict)


MUTANTS = (Mutant("norm", "eps_dropped", "forward", "eps is not added"),)


def anything(request: Request) -> Sequence[Reason]:
    return ()


def backend_of(mutant: Mutant) -> Backend:
    return Backend(
        **{
            "op": mutant.op,
            "name": mutant.name,
            "level": Level.PORTABLE,
            "load": kernel_from(f"picotron_mutants.{mutant.op}:{mutant.name}"),
            "supports": anything,
            "summary": mutant.what,
            **mutant.claims,
        }
    )


@hookimpl
def picotron_backends() -> Iterable[Backend]:
    return map(backend_of, MUTANTS)
