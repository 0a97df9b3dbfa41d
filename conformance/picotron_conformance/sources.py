"""Which files of the suite and of the contracts a result rests on, as sha256 by path."""

from __future__ import annotations

from picotron_core.registry.sources import package_files


def suite_files() -> dict[str, str]:
    """What judges."""
    return package_files("picotron_conformance")


def contract_files() -> dict[str, str]:
    """What is promised: the contracts of the ops."""
    return {
        path: sha256
        for path, sha256 in package_files("picotron_core").items()
        if path.startswith("picotron_core/ops/")
    }
