"""The promise of mem_efficient attention: twice the sequence, twice the memory."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_attention_memory.py"
SHORT, LONG = 1024, 8192


def test_mem_efficient_grows_with_the_length_and_naive_math_with_its_square():
    """Eight times the length. The reference proves the ruler: it can tell the two apart."""
    command = [sys.executable, BENCHMARK, "--json", "--lengths", str(SHORT), str(LONG)]
    command += ["--backends", "naive-math", "mem_efficient"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = json.loads(result.stdout)  # MiB
    naive, lean = (
        (peaks[name][str(SHORT)], peaks[name][str(LONG)])
        for name in ("naive-math", "mem_efficient")
    )
    assert lean[0] > 0.5  # something was measured
    assert lean[1] < 1.25 * LONG / SHORT * lean[0]
    assert naive[1] > LONG**2 * 4 / 2**20  # its logits alone
    assert naive[1] > 2.5 * LONG / SHORT * naive[0]
