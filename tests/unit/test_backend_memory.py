"""Attention's peak memory, really measured: by resident size, a process for each point."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_attention_memory.py"


def test_mem_efficient_grows_linearly_where_naive_math_grows_quadratically():
    """From S = 1k to 8k; a line through these points would rise 8-fold, a parabola 64-fold."""
    command = [sys.executable, BENCHMARK, "--json", "--lengths", "1024", "8192"]
    command += ["--backends", "naive-math", "mem_efficient"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = json.loads(result.stdout)
    lean, naive = peaks["mem_efficient"], peaks["naive-math"]
    assert lean["8192"] < 8 * 1.25 * max(lean["1024"], 1)
    assert naive["8192"] > 16 * naive["1024"]
    # A single float32 (S, S) matrix would be 256 MiB.
    assert lean["8192"] < 64
    assert naive["8192"] > 512
