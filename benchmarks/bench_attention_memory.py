"""Peak memory of attention, forward and backward, by sequence length.

    python benchmarks/bench_attention_memory.py [--json] [--lengths 1024 2048] [--backends sdpa]

Each number is the peak resident memory of a process of its own, above what it held before the
first call: caches and earlier peaks of other points cannot blur it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

BACKENDS = ("naive-math", "sdpa", "mem_efficient")
LENGTHS = (1024, 2048, 4096, 8192)
HEADS, HEAD_DIM = 1, 64


def peak_mib(backend: str, length: int) -> float:
    """Measured in this process, which must be a new one: a peak cannot be forgotten."""
    import torch

    from picotron_core.engine.metrics import peak_memory_bytes
    from picotron_core.registry.plugins import load_registry

    kernel = next(
        candidate.backend.load()
        for candidate in load_registry().candidates
        if (candidate.backend.op, candidate.backend.name) == ("attention", backend)
    )

    def forward_and_backward(length: int) -> None:
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
        kernel(q, k, v, causal=True).sum().backward()

    forward_and_backward(64)  # what torch loads and allocates once
    before = peak_memory_bytes(torch.device("cpu"))
    forward_and_backward(length)
    return (peak_memory_bytes(torch.device("cpu")) - before) / 2**20


def measure(backend: str, length: int) -> float:
    command = [sys.executable, __file__, "--point", backend, str(length)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(peak_mib(arguments.point[0], int(arguments.point[1])))
        return
    table = {
        backend: {length: measure(backend, length) for length in arguments.lengths}
        for backend in arguments.backends
    }
    if arguments.json:
        print(json.dumps(table))
        return
    print(f"MiB at the peak, {HEADS} head of {HEAD_DIM}, float32, forward and backward")
    print(f"{'S':>16}" + "".join(f"{length:>10}" for length in arguments.lengths))
    for backend, row in table.items():
        print(f"{backend:>16}" + "".join(f"{mib:>10.1f}" for mib in row.values()))


if __name__ == "__main__":
    main()
