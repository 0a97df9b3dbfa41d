"""Train, kill -9 at random moments, resume, and so on to the end; then look at what came of it.

    python torture.py FOLDER KILLS RANKS SEED TRAIN_ARGUMENTS...

torch is imported once: each training is a fork of this process, so a kill costs a second, not ten.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forge
import matplotlib.figure
from forked import fork_ranks

from picotron_core import cli
from picotron_core.cli import app, job, train

STEPS, EVERY, LAST = 24, 2, "step-00000024"
PER_RUN = 5  # kills, then it may end
HEAVY = (app, train, matplotlib)  # imported once, for all forks
job.matrix_product_rate = lambda *_: 1e12  # only for MFU, and half a second of every start


def start(arguments: Sequence[str], ranks: int, log: Path) -> list[int]:
    """The ranks' process ids."""

    def train_rank() -> None:
        sys.argv = ["picotron", "train", *arguments]
        cli.main()

    return fork_ranks(ranks, train_rank, log)


def wait(children: list[int], until: float, run: Path, *, saves: int = 0) -> list[int]:
    """Wait until `until`, or until so many saves were begun (0: whatever is saved); the exit codes
    of those that end meanwhile.
    """
    codes: list[int] = []
    before = {path.name for path in run.glob("checkpoints/.writing-*")}
    seen = set(before)
    while any(children):  # 0 is one that was waited for
        for place, child in enumerate(children):
            if child:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    children[place] = 0
                    codes.append(os.waitstatus_to_exitcode(status))
        if time.monotonic() > until:
            break
        seen |= {path.name for path in run.glob("checkpoints/.writing-*")}
        if saves and len(seen) - len(before) >= saves:
            break
        time.sleep(0.001)
    return codes


def main(folder: Path, kills: int, ranks: int, seed: int, arguments: list[str]) -> None:
    chance = random.Random(seed)
    log = folder / "log"
    fixed = [*arguments, "--run.dir", str(folder), "--train.steps", str(STEPS)]
    fixed += ["--checkpoint.every", str(EVERY), "--checkpoint.max_mb_per_s", "8"]
    begin = time.monotonic()
    codes = wait(start([*fixed, "--name", "right"], ranks, log), 1e18, folder)
    whole_s = time.monotonic() - begin
    assert codes == [0] * ranks, log.read_text()[-3000:]
    wanted = result(folder / "right")
    done = in_saves = resumed = number = 0
    while done < kills:
        number += 1
        run = folder / f"run-{number}"
        for left in range(PER_RUN, -1, -1):
            if (run / "checkpoints" / LAST).exists():  # it was done, and killed after that
                break
            if saved := bool(list(run.glob("checkpoints/step-*"))):
                given = ["--resume", str(run)]
                resumed += 1
            else:  # killed before anything was saved
                shutil.rmtree(run, ignore_errors=True)
                given = [*fixed, "--name", run.name]
            children = start(given, ranks, log)
            if not left or done >= kills:
                codes = wait(children, 1e18, run)
                assert codes == [0] * ranks, (given, codes, log.read_text()[-3000:])
                break
            aimed = done % 2 == 0
            until = time.monotonic() + (60 if aimed else chance.uniform(0, whole_s))
            # In the second save at the earliest, or most would start anew.
            saves = chance.randint(1, 2) + (not saved)
            codes = wait(children, until, run, saves=saves if aimed else 0)
            if aimed:
                time.sleep(chance.uniform(0, 0.03))  # a write takes 0.04 s
            for child in chance.sample(children, ranks):
                if child:
                    os.kill(child, signal.SIGKILL)
            killed = wait(children, time.monotonic() + 60, run)
            assert all(code in (0, -9) for code in codes), (given, log.read_text()[-3000:])
            if -9 not in killed:
                break  # it was done before
            done += 1
            in_saves += bool(list(run.glob("checkpoints/.writing-*")))
        found = result(run)
        assert found == wanted, f"{run} came out otherwise"
        shutil.rmtree(run)
    print(json.dumps({"kills": done, "in_saves": in_saves, "resumed": resumed, "runs": number}))


def result(run: Path) -> dict[str, object]:
    """Parameters, moments and random states, scaler and progress, and each step's loss."""
    folder = run / "checkpoints" / LAST
    manifest = forge.manifest_of(folder)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        **{path.name: path.read_bytes() for path in folder.glob("*.safetensors")},
        **{key: manifest[key] for key in ("step", "tokens", "samples", "loss_scale", "files")},
        "losses": [(line["step"], line["loss"], line["tokens"]) for line in lines if "lr" in line],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
