"""A metrics file of a million lines, read and drawn: time over that of json.loads, and peak memory.

    python benchmarks/bench_metrics.py

Each is done in a process of its own. Compare numbers of one run only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

LINES = 1_000_000
LIMIT_S, LIMIT_MB = 3.0, 200

JSON = """
import json, sys
for line in open(sys.argv[1], "rb"):
    json.loads(line)
"""
DRAW = """
import sys
from pathlib import Path
from picotron_core.engine.metrics_scan import read_curve
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]).parent)
plot_losses({"run": read_curve(run)}, run.plot, title="run")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def timed(code: str, path: Path) -> tuple[float, str]:
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return time.perf_counter() - begin, out


def write(path: Path) -> None:
    """Lines of a run, with an evaluation every 200 steps."""
    from picotron_core.engine.metrics import EvalRecord, StepRecord

    with path.open("w") as file:
        for step in range(1, LINES + 1):
            loss = 2 + 3 / step**0.3 + 0.1 * (step * 7919 % 1013) / 1013
            record: StepRecord | EvalRecord = StepRecord(
                **{"step": step, "tokens": 2048 * step, "loss": loss, "grad_norm": loss / 3},
                **{"lr": 1e-3 / loss, "tokens_per_s": 3e4 / loss, "mfu": 0.1 * loss},
                **{"step_s": 0.03 * loss, "peak_memory_bytes": 1_234_567_890},
            )
            file.write(json.dumps(asdict(record)) + "\n")
            if step % 200 == 0:
                record = EvalRecord(
                    step=step, tokens=2048 * step, val_loss=loss, bits_per_byte=loss / 2
                )
                file.write(json.dumps(asdict(record)) + "\n")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write(path)
        plain_s, _ = timed(JSON, path)
        drawn = [timed(DRAW, path) for _ in range(3)]
    seconds, peak = min(s for s, _ in drawn), max(int(out) for _, out in drawn)
    print(f"{LINES} lines: read and drawn in {seconds:.2f} s, imports included; at most {peak} MB")
    print(f"json.loads of every line alone takes {plain_s / seconds:.1f} times as long")
    met = seconds < LIMIT_S and peak < LIMIT_MB
    print(f"goal: {LIMIT_S:.0f} s on an idle core, {LIMIT_MB} MB: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
