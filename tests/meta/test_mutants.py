"""Every wrong kernel dies, and of the check that its table names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from picotron_mutants import MUTANTS, Mutant, backend_of
from trials import DEATHS, candidate_of, families, first_death, outcomes

from picotron_core.ops import OPS
from picotron_core.registry import Backend, Level, kernel_from

EVERY = 12  # of the mutants that are not the first of their kind
MATRIX = Path(__file__).parents[2] / "docs" / "kill_matrix.md"


def _selected() -> list[Mutant]:
    """The first that each family must kill in each op, and some of the others."""
    firsts = {(mutant.op, mutant.killed_by): mutant for mutant in reversed(MUTANTS)}
    quick = [mutant for mutant in MUTANTS if not mutant.slow and mutant.op != "comm"]
    chosen = {*map(id, firsts.values()), *map(id, quick[::EVERY])}
    return [mutant for mutant in MUTANTS if id(mutant) in chosen and not mutant.slow]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutant" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--meta-all", default=False)
        chosen = MUTANTS if everything else _selected()
        metafunc.parametrize("mutant", chosen, ids=lambda mutant: f"{mutant.op}-{mutant.name}")


def test_a_mutant_dies_of_the_check_that_it_names(mutant: Mutant) -> None:
    candidate = candidate_of(backend_of(mutant), "mutants")
    profile = "full" if mutant.slow else "quick"
    assert first_death(candidate, mutant.killed_by, profile=profile), (
        f"{mutant.op}/{mutant.name} lives: {mutant.what}"
    )


BASES = {
    "attention": "flash:Flash",
    "norm": "norm:Norm",
    "rope": "rope:Turn",
    "swiglu": "swiglu:Gated",
    "loss": "loss:Head",
    "optimizer": "optimizer:Update",
}


@pytest.mark.parametrize("op", BASES)
def test_what_the_mutants_are_made_of_is_right(op: str, request: pytest.FixtureRequest) -> None:
    """Or they might die of their base, and not of what is wrong with them."""
    everything = request.config.getoption("--meta-all", default=False)
    base = kernel_from(f"picotron_mutants.{BASES[op]}")()()
    right = Backend(
        op=op, name="right", level=Level.PORTABLE, load=lambda: base, supports=lambda request: ()
    )
    found = outcomes(
        candidate_of(right, "mutants"),
        lambda place, _: everything or place % EVERY == 0,
        profile="full" if everything else "quick",
    )
    accused = [f"{o.id}: {o.detail}" for o in found if o.verdict in DEATHS]
    assert not accused


def test_there_are_enough_of_them() -> None:
    assert len([mutant for mutant in MUTANTS if not mutant.slow]) >= 70


def test_their_names_are_unique_in_an_op() -> None:
    twice = [key for key, n in Counter((m.op, m.name) for m in MUTANTS).items() if n > 1]
    assert not twice


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_mutants_that_existing_checks_kill(op: str) -> None:
    named = {mutant.killed_by for mutant in MUTANTS if mutant.op == op}
    assert named
    assert named <= families(op)


def test_the_kill_matrix_lists_these_mutants() -> None:
    page = MATRIX.read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    listed = {
        (section.split("\n", 1)[0], name)
        for section in sections
        for name in re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    }
    assert listed == {(mutant.op, mutant.name) for mutant in MUTANTS}, "run `make meta`"
