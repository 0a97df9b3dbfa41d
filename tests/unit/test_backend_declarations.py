"""What the bundled backends say of themselves: without torch, and for any card."""

import subprocess
import sys

import pytest
import torch.distributed

from picotron_core.errors import BackendError
from picotron_core.hardware import PROFILES, Device
from picotron_core.registry import Candidate, Code, Level, Request
from picotron_core.registry.plugins import BUNDLED, load_registry
from picotron_core.registry.select import resolve

BACKENDS = {(c.backend.op, c.backend.name): c for c in load_registry().candidates}
TRAINING = frozenset({"causal", "gqa"})


def test_declaring_imports_no_torch():
    """Only `load` may: a declaration is read for every backend, chosen or not."""
    script = (
        "import importlib, sys\n"
        f"backends = [b for module in {BUNDLED!r}\n"
        "            for b in importlib.import_module(module).picotron_backends()]\n"
        "assert len(backends) > 10\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def request(device, dtype="float32", features=TRAINING, op="attention", **sizes):
    letters = {"H": 8, "K": 4, "D": 64, "T": 512, "S": 512, **sizes}
    return Request(
        op=op, device=PROFILES[device], dtype=dtype, features=frozenset(features), sizes=letters
    )


def level(candidate: Candidate, asked: Request) -> Level:
    declared = candidate.backend.level
    return declared if isinstance(declared, Level) else declared(asked)


CHOICES = [
    # device, dtype, features beyond causal and gqa, D -> who wins auto
    ("cpu", "float32", {}, 64, "sdpa"),
    ("cpu", "bfloat16", {}, 64, "sdpa"),
    ("cpu", "float32", {"doc_ids"}, 64, "mem_efficient"),
    ("cpu", "float32", {"window"}, 64, "mem_efficient"),
    ("cpu", "float32", {"offset"}, 64, "mem_efficient"),
    ("cpu", "float32", {"lse", "lse_backward"}, 64, "mem_efficient"),
    ("gtx1080", "float32", {}, 64, "mem_efficient"),
    ("p100", "float16", {}, 63, "mem_efficient"),
    ("v100", "float16", {}, 64, "mem_efficient"),
    ("t4", "float16", {}, 64, "mem_efficient"),
    ("t4", "float32", {}, 63, "mem_efficient"),
    ("t4", "float16", {"doc_ids"}, 64, "mem_efficient"),
    ("a100", "bfloat16", {}, 64, "sdpa"),
    ("a100", "float32", {}, 64, "mem_efficient"),
    ("h100", "bfloat16", {}, 128, "sdpa"),
    ("h100", "bfloat16", {"window"}, 128, "mem_efficient"),
    ("h100", "bfloat16", {"offset"}, 128, "mem_efficient"),
]


@pytest.mark.parametrize(("device", "dtype", "features", "D", "winner"), CHOICES)
def test_who_wins_attention(device, dtype, features, D, winner):
    asked = request(device, dtype, TRAINING | set(features), D=D)
    selection = resolve((), [asked], list(BACKENDS.values()))["attention"]
    assert selection.chosen is BACKENDS["attention", winner]


@pytest.mark.parametrize(
    ("device", "dtype", "features", "D", "expected"),
    [
        ("t4", "float16", set(), 64, Level.ACCELERATED),
        # torch's kernel wants rows of 16 bytes from sm_70 on, bfloat16 only from sm_80 on, no mask,
        # no lse: there the blockwise one serves.
        ("t4", "float16", set(), 60, Level.PORTABLE),
        ("t4", "bfloat16", set(), 64, Level.PORTABLE),
        ("p100", "float16", set(), 60, Level.ACCELERATED),
        ("t4", "float16", {"window"}, 64, Level.PORTABLE),
        ("t4", "float16", {"doc_ids"}, 64, Level.PORTABLE),
        ("t4", "float16", {"lse"}, 64, Level.PORTABLE),
        ("t4", "float16", {"cross_length"}, 64, Level.PORTABLE),
        ("t4", "float16", {"offset"}, 64, Level.PORTABLE),
        ("a100", "float32", set(), 64, Level.ACCELERATED),
        ("a100", "float32", set(), 62, Level.PORTABLE),
        ("cpu", "float32", set(), 64, Level.PORTABLE),
    ],
)
def test_mem_efficient_attention_ranks_by_the_kernel_that_would_serve(
    device, dtype, features, D, expected
):
    asked = request(device, dtype, TRAINING | features, D=D)
    assert level(BACKENDS["attention", "mem_efficient"], asked) is expected


@pytest.mark.parametrize(
    ("device", "dtype", "features", "sizes", "expected"),
    [
        ("cpu", "float32", set(), {}, Level.ACCELERATED),
        ("cpu", "float32", {"cross_length"}, {"T": 1}, Level.ACCELERATED),  # needs no mask
        ("cpu", "float32", {"cross_length"}, {"T": 4}, Level.PORTABLE),
        ("cpu", "float32", {"window"}, {}, Level.PORTABLE),
        ("cpu", "float32", {"offset"}, {}, Level.PORTABLE),
        ("cpu", "float32", {"cross_length", "offset"}, {"T": 1}, Level.PORTABLE),
        ("t4", "float16", set(), {}, Level.PORTABLE),
        ("a100", "float16", set(), {}, Level.ACCELERATED),
        ("a100", "float32", set(), {}, Level.PORTABLE),
        ("a100", "bfloat16", set(), {"D": 320}, Level.PORTABLE),
        ("a100", "bfloat16", {"doc_ids"}, {}, Level.PORTABLE),
    ],
)
def test_sdpa_is_accelerated_only_where_torch_has_flash(device, dtype, features, sizes, expected):
    asked = request(device, dtype, TRAINING | features, **sizes)
    assert level(BACKENDS["attention", "sdpa"], asked) is expected


@pytest.mark.parametrize("feature", ["lse", "lse_backward"])
def test_sdpa_refuses_what_torch_does_not_return(feature):
    (reason,) = BACKENDS["attention", "sdpa"].backend.supports(request("cpu", features={feature}))
    assert reason.code is Code.FEATURE
    assert "log-sum-exp" in reason.detail


@pytest.mark.parametrize(
    ("device", "world", "winner"),
    [
        ("cpu", 1, "local"),
        ("cpu", 4, "gloo-cpu"),
        ("h100", 1, "local"),
        ("t4", 4, "nccl"),
    ],
)
def test_who_wins_comm(device, world, winner):
    asked = Request(op="comm", device=PROFILES[device], dtype="float32", sizes={"world": world})
    selection = resolve((), [asked], list(BACKENDS.values()))["comm"]
    assert selection.chosen is BACKENDS["comm", winner]
    for verdict in selection.refused:
        assert verdict.reasons[0].fix


@pytest.mark.parametrize("op", ["norm", "rope", "swiglu", "loss", "optimizer"])
@pytest.mark.parametrize("device", PROFILES)
def test_every_other_op_has_a_backend_everywhere(op, device):
    asked = Request(op=op, device=PROFILES[device], dtype="float32", sizes={"E": 64, "V": 100})
    selection = resolve((), [asked], list(BACKENDS.values()))[op]
    assert selection.chosen.provider.bundled
    assert BACKENDS[op, "naive-math"].backend.level is Level.REFERENCE


def test_every_backend_says_what_it_is():
    assert all(candidate.backend.summary for candidate in BACKENDS.values())


@pytest.mark.parametrize(
    ("op", "device", "winner"),
    [
        ("norm", "cpu", "naive-math"),  # torch's own gains nothing there
        ("norm", "t4", "torch-fused"),
        ("rope", "cpu", "naive-math"),
        ("swiglu", "cpu", "mem_efficient"),
        ("loss", "t4", "mem_efficient"),
        ("optimizer", "cpu", "torch-fused"),
        ("optimizer", "gtx1080", "torch-fused"),
    ],
)
def test_who_wins_the_other_ops(op, device, winner):
    asked = Request(op=op, device=PROFILES[device], dtype="float32")
    selection = resolve((), [asked], list(BACKENDS.values()))[op]
    assert selection.chosen is BACKENDS[op, winner]


def test_the_fused_optimizer_refuses_a_device_it_has_no_kernel_for():
    asked = Request(op="optimizer", device=Device(type="xla", name="a TPU"), dtype="float32")
    (reason,) = BACKENDS["optimizer", "torch-fused"].backend.supports(asked)
    assert reason.code is Code.DEVICE


@pytest.mark.parametrize("key", BACKENDS, ids="-".join)
def test_every_kernel_loads_here_or_says_what_is_missing(key):
    backend = BACKENDS[key].backend
    if backend.name == "nccl" and not torch.distributed.is_nccl_available():
        with pytest.raises(BackendError, match=r"nccl was asked for, but torch .* without it"):
            backend.load()
        return
    kernel = backend.load()
    assert callable(kernel.all_reduce if backend.op == "comm" else kernel)
