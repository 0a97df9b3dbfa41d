"""`picotron verify-resume`: whether a run that was interrupted becomes the run that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

from picotron_core.checkpoint.commit import folder_of
from picotron_core.checkpoint.load import Checkpoint, open_checkpoint
from picotron_core.cli.stop import SAME_S
from picotron_core.engine.metrics_file import read_metrics
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import RunError
from picotron_core.parallel.lifeline import Starter, starter
from picotron_core.parallel.piece import whole

# On another layout sums are added in another order: of a tensor as a whole, relative to its norm.
TOLERANCE = 1e-4
STOP_S = 10.0  # what a training that is interrupted may take to end


def run_verify_resume(
    words: Sequence[str], *, steps: int, nproc: int, then_nproc: int, then: Sequence[str]
) -> int:
    """Train in children, so that the resumed half starts from what is on disk and nothing else.

    Args:
        words: a config and settings, as `picotron train` takes them.
        then: "parallel.tp=2": settings of the resumed half.

    Returns: 0, or 1 after naming the first tensor that differs.
    """
    half = steps // 2
    other = [part for setting in then for part in _flag(setting)]
    with starter() as start:
        folder = start.folder.path
        one = folder / "whole"
        fixed = [
            *("--train.steps", str(steps), "--checkpoint.every", str(half)),
            *("--checkpoint.keep", "9", "--run.dir", str(folder), "--run.name", one.name),
        ]
        print(f"{steps} steps on {_ranks(nproc)} ...", flush=True)
        _train([*words, *fixed, "--nproc", str(nproc)], start)
        two = folder / "resumed"
        shutil.copytree(one, two)
        for checkpoint in (two / "checkpoints").iterdir():
            if checkpoint != folder_of(two / "checkpoints", half):
                shutil.rmtree(checkpoint)
        print(f"step {half} resumed to {steps} on {_ranks(then_nproc)} ...", flush=True)
        _train(["--resume", str(two), "--nproc", str(then_nproc), *other], start)
        found = [open_checkpoint(folder_of(run / "checkpoints", steps)) for run in (one, two)]
        exact = found[0].manifest.layout == found[1].manifest.layout and not then
        return _compare(*found, half=half, runs=(one, two), limit=0.0 if exact else TOLERANCE)


def _flag(setting: str) -> tuple[str, str]:
    key, _, value = setting.partition("=")
    return f"--{key}", value


def _ranks(nproc: int) -> str:
    return f"{nproc} ranks" if nproc > 1 else "one rank"


def _train(arguments: Sequence[str], start: Starter) -> None:
    command = [sys.executable, "-m", "picotron_core.cli", "train", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **start.variables},
        pass_fds=start.descriptors,
    )
    try:
        out, err = process.communicate()
    except BaseException:  # above all Ctrl-C: the child stops its ranks; a second one, at once
        for patience_s in (SAME_S + 0.1, STOP_S):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=patience_s)
                break
        process.kill()
        process.communicate()
        raise
    if process.returncode:
        said = (err or out).strip().splitlines()[-5:]
        raise RunError("The training failed: " + " ".join(said))


def _compare(
    one: Checkpoint, two: Checkpoint, *, half: int, runs: tuple[Path, Path], limit: float
) -> int:
    first, second = one.manifest, two.manifest
    for what in ("step", "tokens", "samples", "loss_scale"):
        if getattr(first, what) != getattr(second, what):
            print(f"DIFFERENT: {what} is {getattr(first, what)}, resumed {getattr(second, what)}")
            return 1
    losses = [_loss(run, half + 1) for run in runs]
    print(f"the loss of step {half + 1}: {losses[0]:.9g}, resumed {losses[1]:.9g}")
    worst, name_of_worst = 0.0, ""
    for kind in first.kinds:
        for name, shape in first.parameters.items():
            a, b = (of.read(kind, name, whole(prod(shape))) for of in (one, two))
            if torch.equal(a, b):
                continue
            error = float((a - b).double().norm() / a.double().norm())
            if not error <= limit:
                print(f"DIFFERENT: {kind} of {name}: the first tensor that is, by {error:.2g}")
                return 1
            worst, name_of_worst = max((worst, name_of_worst), (error, f"{kind} of {name}"))
    count = len(first.kinds) * len(first.parameters)
    if name_of_worst:
        print(f"ALIKE: {count} tensors differ by at most {worst:.2g} ({name_of_worst})")
    else:
        print(f"EQUAL: {count} tensors, bit for bit")
    return 0


def _loss(run: Path, step: int) -> float:
    lines = read_metrics(RunDirectory(run))
    return float(next(line["loss"] for line in lines if line["step"] == step and "loss" in line))
