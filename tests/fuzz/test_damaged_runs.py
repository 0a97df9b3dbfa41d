"""A damaged run is used as if it were whole, or refused by name, and nothing else in silence."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import judge
import pytest
import tomli_w
from commands import Outcome, Server
from corruption import corrupt

HANG_S = 60
COMMANDS = {
    "verify": ("checkpoint", "verify", "runs/a"),
    "generate": ("generate", "runs/a", "--prompt", "def ", "--max-new-tokens", "4"),
    "export": ("export", "runs/a", "exported"),
    "resume": ("train", "--resume", "runs/a", "--train.steps", "6"),
}


@pytest.fixture(scope="session")
def runs(
    server: Server, env: dict[str, str], base: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with two runs on the same text, of four steps, with two checkpoints each."""
    folder = tmp_path_factory.mktemp("whole")
    for name, seed, vocab_size in (("a", 0, 300), ("b", 1, 290)):
        values = {section: dict(table) for section, table in base.items()}
        values["run"]["name"] = name
        values["train"] |= {"seed": seed, "lr": 0.01 + seed / 100}
        values["data"]["vocab_size"] = vocab_size
        (folder / f"{name}.toml").write_text(tomli_w.dumps(values))
        outcome = server.picotron(["train", f"{name}.toml"], cwd=folder, env=env)
        assert outcome.code == 0, outcome.said
        steps = [path.name for path in sorted((folder / "runs" / name / "checkpoints").iterdir())]
        assert steps == ["step-00000002", "step-00000004"], outcome.said
    return folder


@pytest.fixture(scope="session")
def whole(
    runs: Path, server: Server, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each command does with the run that is whole."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(runs / "runs/a", folder / "runs/a")
    found = {}
    for name, words in COMMANDS.items():
        outcome = server.picotron(words, cwd=folder, env=env)
        assert outcome.code == 0, outcome.said
        found[name] = RESULTS[name](folder, outcome)
    return found


def test_damage_is_named_or_changes_nothing(
    case: int,
    fuzz_seed: int,
    fuzz_all: bool,
    server: Server,
    env: dict[str, str],
    runs: Path,
    whole: dict[str, Any],
    tmp_path: Path,
) -> None:
    shutil.copytree(runs / "runs/a", tmp_path / "runs/a")
    drawing = random.Random(f"damage {fuzz_seed} {case}")
    damaged, done = corrupt(drawing, tmp_path / "runs/a", runs / "runs/b")
    skipped = [] if fuzz_all else drawing.sample(list(COMMANDS), 2)
    for name, words in COMMANDS.items():  # in this order: a resume changes the run
        if name in skipped:
            continue
        outcome = server.picotron(words, cwd=tmp_path, env=env, timeout_s=HANG_S)
        wrong = judge.fault(outcome, reports=name == "verify")
        if not wrong and not is_named(damaged, outcome):
            if outcome.code:
                wrong = "its error does not name the file"
            elif RESULTS[name](tmp_path, outcome) != whole[name]:
                wrong = "it silently did something else than with the whole run"
        if wrong:
            pytest.fail(
                f"{damaged} {done}: picotron {' '.join(words)}: {wrong}. Again: python -m pytest "
                f"tests/fuzz/{Path(__file__).name} --fuzz-seed {fuzz_seed} --fuzz-case {case}\n"
                f"{outcome.said[-3000:]}",
                pytrace=False,
            )


def is_named(damaged: Path, outcome: Outcome) -> bool:
    """Whether the output has the name of the file, of its folder where that is one of a checkpoint
    or the tokenizer, or of what a changed setting now is.
    """
    if damaged.name == "config.toml" and outcome.err:
        return True  # settings are the user's own: an error or a warning tells of them by their key
    names = [damaged.name, *(part for part in damaged.parts[:-1] if part != "checkpoints")]
    return any(name in outcome.err + outcome.out for name in names)


def exported(folder: Path, _: Outcome) -> dict[str, str]:
    return digests(folder / "exported")


def resumed(folder: Path, _: Outcome) -> dict[str, str]:
    """The tensors of the last checkpoint; beside them a manifest holds settings and versions."""
    found = digests(folder / "runs/a/checkpoints/step-00000006")
    return {name: value for name, value in found.items() if name != "manifest.json"}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


RESULTS: dict[str, Callable[[Path, Outcome], Any]] = {
    "verify": lambda _, outcome: outcome.out,
    "generate": lambda _, outcome: outcome.out,
    "export": exported,
    "resume": resumed,
}
