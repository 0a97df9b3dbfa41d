"""The promise of mem_efficient attention: twice the sequence, twice the memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_attention_memory.py"
SHORT, LONG = 1024, 8192


@pytest.fixture(scope="module")
def peaks():
    command = [sys.executable, BENCHMARK, "--json", "--lengths", str(SHORT), str(LONG)]
    command += ["--backends", "naive-math", "mem_efficient"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def growth(peaks, backend):
    return peaks[backend][str(LONG)] / peaks[backend][str(SHORT)]


def test_mem_efficient_attention_grows_with_the_length(peaks):
    assert peaks["mem_efficient"][str(SHORT)] > 0.5  # MiB: something was measured
    assert growth(peaks, "mem_efficient") < 1.25 * LONG / SHORT


def test_naive_attention_grows_with_the_square(peaks):
    """Proves the ruler: it can tell the two apart."""
    # its logits alone; a length is not yet 8 times another's square where fixed costs count
    assert peaks["naive-math"][str(LONG)] > LONG**2 * 4 / 2**20
    assert growth(peaks, "naive-math") > 2.5 * LONG / SHORT
