"""A measured peak is that of the tensors, and a state that nobody holds gives its memory back."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from picotron_backends.one_process import COMM

from picotron_core.engine.peak import reset_peak
from picotron_core.model.architecture import Architecture
from picotron_core.model.llama import Llama
from picotron_core.ops import Ops
from picotron_core.parallel.data import Replicas
from picotron_core.parallel.mesh import make_mesh
from picotron_core.parallel.zero1 import Shards

CPU = torch.device("cpu")


IN_A_NEW_PROCESS = """
import torch
from picotron_core.engine.peak import hold_no_freed_memory, peak, reset_peak

hold_no_freed_memory(True)
cpu = torch.device("cpu")
torch.ones(2**23).add_(1)  # what torch makes once
for megabytes in (64, 16):  # the second is below the first one's peak
    before = reset_peak(cpu)
    for _ in range(3):
        held = [torch.ones(megabytes // 2 * 2**18) for _ in range(2)]
        del held
        torch.ones(megabytes // 4 * 2**18)
    print((peak(cpu) - before) / 2**20)
"""


@pytest.mark.skipif(reset_peak(CPU) is None, reason="this system keeps no peak to reset")
def test_a_peak_is_what_the_tensors_took():
    """In a process where nothing else comes and goes."""
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [float(word) for word in result.stdout.split()] == pytest.approx([64, 16], rel=0.03)


@pytest.mark.parametrize("kind", [Replicas, Shards])
def test_weights_that_nobody_holds_are_freed(kind):
    """Though their hooks lead back to them."""
    architecture = Architecture(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=11,
    )
    model = Llama(architecture, Ops(**dict.fromkeys(Ops.__slots__)))
    mesh = make_mesh(COMM, rank=0, world_size=1)
    weights = kind(model, device=CPU, dtype=torch.float32, axis=mesh.data, capacity=0)
    watched = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, weights
    gc.collect()
    assert [parameter() for parameter in watched] == [None] * len(watched)
