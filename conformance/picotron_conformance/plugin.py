"""The pytest plugin. Loaded in every pytest session on the machine, so it imports nothing of weight
until a session asks for a backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from picotron_conformance.proof import Proof

PROOF: pytest.StashKey[Proof] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("picotron", "Picotron: proving backends")
    group.addoption(
        "--picotron-backend",
        action="append",
        default=[],
        metavar="OP=NAME",
        help="what to prove: op=name, a bare name for all of its ops, or all for every bundled "
        "backend; repeatable. A plugin's backend is called plugin/name.",
    )
    group.addoption(
        "--picotron-profile",
        choices=("quick", "full", "fuzz"),
        default="quick",
        help="quick: for each change; full: for a certificate; fuzz: many random cases, new ones "
        "each time. Default: quick.",
    )
    group.addoption(
        "--picotron-device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu or cuda. Default: auto, the GPU where there is one.",
    )
    group.addoption(
        "--picotron-seed",
        type=int,
        metavar="N",
        help="of the inputs. Default: 0, and a new one under fuzz; the header shows it.",
    )
    group.addoption(
        "--picotron-report", metavar="FILE", help="write every check's outcome as JSON."
    )
    group.addoption(
        "--picotron-certificate",
        metavar="FILE",
        help="write a certificate, if a whole full profile passes.",
    )


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("--picotron-backend")
    if not asked:
        for option in ("--picotron-report", "--picotron-certificate"):
            if config.getoption(option):
                raise pytest.UsageError(f"{option} needs a --picotron-backend to report on")
        return
    from picotron_conformance.proof import start
    from picotron_core.errors import PicotronError

    try:
        proof = start(config)
    except PicotronError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[PROOF] = proof
    config.pluginmanager.register(proof, "picotron-proof")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    suite = "picotron_conformance.test_backend"
    if PROOF not in config.stash and any(_module(item) == suite for item in items):
        raise pytest.UsageError(
            "Say what to prove: --picotron-backend OP=NAME, NAME, or all. "
            "`picotron backends` lists what is there."
        )


def _module(item: pytest.Item) -> str:
    return getattr(getattr(item, "module", None), "__name__", "")
