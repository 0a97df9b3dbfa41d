"""Asking one check, and a session of them: whatever a kernel does becomes a verdict."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from picotron_conformance.check import Check, UndecidedError, Verdict, WrongKernelError
from picotron_conformance.run import ask, target_of
from picotron_conformance.surroundings import put_back, snapshot
from picotron_conformance.watchdog import deadline

from picotron_core.hardware import look, profile
from picotron_core.registry import Backend, Candidate, Code, Level, Provider, Reason, Request

CPU = look("cpu")


def candidate(kernel, *, supports=lambda request: (), load=None, **claims):
    backend = Backend(
        op="norm",
        name="tried",
        level=Level.PORTABLE,
        load=load or (lambda: kernel),
        supports=supports,
        **claims,
    )
    return Candidate(backend=backend, provider=Provider(plugin="p", distribution="d", version="1"))


def verdict(kernel=None, *, run=None, device=CPU, seconds=60.0, refused=None, **more):
    asked = candidate(kernel, **more)
    request = Request(op="norm", device=device, dtype="float32", sizes={"N": 2, "E": 4})
    check = Check(
        op="norm",
        name="try",
        case="",
        dtype="float32",
        aspect="forward",
        run=run or (lambda target, record: target.kernel()),
        refused=refused,
        request=request,
        seconds=seconds,
    )
    load = partial(target_of, asked, device=device, profile="quick", seed=0)
    return ask(asked, check, load, device=device)


def raises(error):
    def kernel():
        raise error

    return kernel


def loops():
    while True:
        pass


@pytest.mark.parametrize(
    ("kernel", "wanted", "says"),
    [
        (lambda: None, Verdict.PASS, ""),
        (raises(WrongKernelError("off by one", hint="a tail")), Verdict.FAIL, "off by one"),
        (raises(RuntimeError("no such kernel")), Verdict.ERROR, "RuntimeError: no such kernel"),
        (raises(SystemExit("libcuda is gone")), Verdict.ERROR, "SystemExit: libcuda is gone"),
        (raises(AssertionError()), Verdict.ERROR, "AssertionError"),
        (raises(UndecidedError(Verdict.UNSUPPORTED, "none")), Verdict.UNSUPPORTED, "none"),
        (loops, Verdict.TIMEOUT, "still running after 0.3 s"),
    ],
)
def test_what_a_kernel_does_becomes_a_verdict(kernel, wanted, says):
    outcome = verdict(kernel, seconds=0.3)
    assert outcome.verdict is wanted
    assert says in outcome.detail


def test_a_kernel_that_cannot_be_loaded_is_an_error():
    def load():
        raise OSError("libacme.so: cannot open")

    outcome = verdict(load=load)
    assert outcome.verdict is Verdict.ERROR
    assert "libacme.so" in outcome.detail


def no(code):
    return lambda request: (Reason(code=code, detail="it cannot"),)


def test_what_is_not_claimed_is_asked_whether_it_refuses():
    asked = []
    outcome = verdict(supports=no(Code.SHAPE), refused=lambda *_: asked.append(1))
    assert (outcome.verdict, asked) == (Verdict.UNSUPPORTED, [1])
    wrong = WrongKernelError("it computes all the same")
    outcome = verdict(supports=no(Code.SHAPE), refused=lambda *_: raises(wrong)())
    assert outcome.verdict is Verdict.FAIL


@pytest.mark.parametrize("code", [Code.DEVICE, Code.CAPABILITY, Code.VERSION])
def test_what_could_take_the_process_down_is_never_called(code):
    outcome = verdict(supports=no(code), load=loops, refused=lambda *_: loops(), seconds=5)
    assert outcome.verdict in (Verdict.NOT_RUN, Verdict.UNSUPPORTED)
    assert "it cannot" in outcome.detail


def test_a_distribution_that_is_missing_is_not_this_kernels_fault():
    outcome = verdict(load=loops, requires=("no-such-distribution>=2",), seconds=5)
    assert outcome.verdict is Verdict.NOT_RUN
    assert "no-such-distribution is not installed" in outcome.detail


def test_a_device_that_is_not_there_runs_nothing():
    def supports(request):
        return no(Code.DEVICE)(request) if request.device.type == "cpu" else ()

    assert verdict(lambda: None, supports=supports).verdict is Verdict.NOT_RUN
    assert profile("t4").type == "cuda"


CHANGES = {
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's random state": lambda: torch.rand(1),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "the number of threads": lambda: torch.set_num_threads(3),
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "the environment": lambda: os.environ.update(NVIDIA_TF32_OVERRIDE="1"),
    "the flushing of denormals": lambda: torch.set_flush_denormal(True),
    "torch's own functions": lambda: setattr(torch.testing, "assert_close", print),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_a_call_changes_is_seen_and_put_back(name):
    before = snapshot()
    outcome = verdict(CHANGES[name])
    assert outcome.verdict is Verdict.FAIL
    assert name in outcome.detail
    assert put_back(before) == []
    assert verdict(lambda: None).verdict is Verdict.PASS


def hang_in_native_code():
    """PBKDF2 runs in C for seconds, and Python's signal handlers wait until it is done."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)


def test_native_code_that_hears_no_alarm_is_given_up():
    given_up = threading.Event()
    with pytest.raises(TimeoutError), deadline(0.2, given_up.set):
        hang_in_native_code()
    assert given_up.is_set()


KERNELS = """
import ctypes
import torch
from picotron_core.registry import Backend, Level, hookimpl

def rms_norm(x, weight, *, eps):
    if x.shape[-1] == 123:
        ctypes.string_at(0)
    exact = x.float()
    return (exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight

@hookimpl
def picotron_backends():
    yield Backend(op="norm", name="dies", level=Level.PORTABLE, load=lambda: rms_norm,
                  supports=lambda request: ())
"""


def test_a_kernel_that_kills_its_process_costs_one_check(tmp_path):
    """Under pytest-xdist: the report has every other answer."""
    (tmp_path / "acme.py").write_text(KERNELS)
    info = tmp_path / "acme-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[picotron]\nacme = acme\n")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", "1", "--pyargs", "picotron_conformance"),
            *("--picotron-backend", "norm=acme/dies", "--picotron-report", "report.json"),
            *("-k", "forward and float32", "-p", "no:cacheprovider"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout[-2000:]
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    asked = {c["id"]: c for c in checks if c["check"] == "forward" and c["dtype"] == "float32"}
    broken = [id for id, check in asked.items() if check["verdict"] != "PASS"]
    assert broken == ["norm=acme/dies-forward-float32-E123"]
    assert asked[broken[0]]["verdict"] == "ERROR"
    assert "killed its process" in asked[broken[0]]["detail"]
    assert len(asked) > 35


def test_a_session_that_proves_nothing_imports_nothing_of_weight(tmp_path):
    """The plugin is loaded wherever Picotron is installed."""
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.hasplugin('picotron_conformance')\n"
        "    assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "test_light.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_fuzz_takes_a_new_seed_each_time_and_says_it(tmp_path):
    seeds = set()
    for _ in range(2):
        result = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "--pyargs", "picotron_conformance", "-q"),
                *("--picotron-backend", "swiglu=naive-math", "--picotron-profile", "fuzz"),
                *("-k", "drawn-399 and float32", "-p", "no:cacheprovider"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        assert "2 passed" in result.stdout
        seeds.add(result.stdout.partition("seed ")[2].split(",")[0])
    assert len(seeds) == 2
    assert all(seed.isdigit() for seed in seeds)
