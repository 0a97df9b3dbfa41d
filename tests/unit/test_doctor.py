"""The doctor, on this machine and on some with something wrong; the children are real."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from picotron_core.cli.doctor.child import Task, examine_in_children
from picotron_core.cli.doctor.command import examine
from picotron_core.cli.doctor.disk import try_disk
from picotron_core.cli.doctor.machine import ask_nvidia_smi
from picotron_core.cli.doctor.problems import find_problems
from picotron_core.config import load_settings

OPS = {"attention", "norm", "rope", "swiglu", "loss", "optimizer", "comm"}
DTYPES = ["float32", "float16", "bfloat16"]
cpu_build = pytest.mark.skipif(torch.version.cuda is not None, reason="of a torch without CUDA")


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Put a module where children find it first: this process has its own already."""
    folder = tmp_path / "first"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(name: str, source: str) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source))
        return folder

    return write


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """An nvidia-smi of our own, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(script: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)

    return write


@pytest.fixture(scope="module")
def sound():
    """This machine's report on its CPU, as the text that --json prints."""
    report = examine(load_settings(None, [("run.device", "cpu")], env={}), None)
    assert report["problems"] == []
    return json.dumps({**report, "settings": {**report["settings"], "device": "auto"}})


def told(report: dict) -> tuple[str, str]:
    """The one problem."""
    (problem,) = find_problems(report)
    return problem.severity, problem.text


T4 = {"name": "Tesla T4", "driver": "535.1", "memory_bytes": 15 << 30, "capability": [7, 5]}


def in_a_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`picotron doctor` that tells at its end which of these it has imported."""
    script = (
        "import sys\nfrom picotron_core.cli import main\n"
        f"sys.argv = ['picotron', 'doctor', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    print({'torch', 'numpy', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=cwd
    )


def problems_in(out: str) -> list[str]:
    return [line.strip() for line in out.partition("\nProblems\n")[2].splitlines()]


def test_a_healthy_machine(tmp_path):
    result = in_a_process("--device", "cpu", cwd=tmp_path)
    assert problems_in(result.stdout) == ["No problem found."]
    assert result.returncode == 0
    assert result.stderr == "set()\n"  # torch was imported in a child alone
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in result.stdout.splitlines()}
    assert rows["optimizer", "picotron/torch-fused"] == ["ok", "*"]
    assert rows["loss", "picotron/mem_efficient"][:2] == ["ok", "*"]
    assert rows["loss", "picotron/mem_efficient"][2:4] == ["slow", "*"]  # float16 on a CPU
    assert "GFLOP/s" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_torch_that_dies_of_sigill_at_import_becomes_a_sentence(put, tmp_path):
    put("torch.py", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    result = in_a_process("--device", "cpu", cwd=tmp_path)
    assert result.returncode == 1
    (problem,) = problems_in(result.stdout)
    assert problem.startswith("error: Importing torch")
    assert " died of SIGILL: this CPU lacks an instruction that the build uses (File " in problem
    assert "pip install" in problem
    assert result.stderr == "set()\n"


def test_torch_that_is_not_there_is_a_pip_line(put, picotron):
    put("torch.py", "raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    code, out, _ = picotron("doctor")
    assert code == 1
    (problem,) = problems_in(out)
    assert "torch cannot be imported: ModuleNotFoundError" in problem
    assert problem.endswith("--index-url https://download.pytorch.org/whl/cpu")


P100 = 'echo "Tesla P100-PCIE-16GB, 535.104.05, 16384, 6.0"'


@cpu_build
def test_a_gpu_that_the_build_of_torch_cannot_use(nvidia_smi, picotron):
    nvidia_smi(P100)
    code, out, _ = picotron("doctor", "--device", "cuda")
    assert code == 1
    (problem,) = problems_in(out)
    assert "nvidia-smi sees Tesla P100-PCIE-16GB (compute capability 6.0)" in problem
    assert "is a build for CPUs. Install one with kernels for it: pip install " in problem
    assert problem.endswith("/whl/cu126")


def test_the_report_as_data(sound):
    report = json.loads(sound)
    assert set(report) == {
        *("machine", "settings", "torch", "devices", "compute", "launches", "rates", "plugins"),
        *("disk", "troubles", "deaths", "complete", "problems", "can_train"),
    }
    assert report["can_train"] is report["complete"] is True
    assert report["torch"]["version"] == torch.__version__
    assert {row["op"] for row in report["launches"]} == OPS
    tried = [row for row in report["launches"] if row["status"] != "refused"]
    assert {row["status"] for row in tried} <= {"ok", "slow", "emulated"}
    for dtype in DTYPES:
        ops = {row["op"] for row in tried if row["dtype"] == dtype and row["turn"] == 0}
        assert ops == (OPS if dtype == "float32" else OPS - {"optimizer", "comm"})
    assert {row["status"] for row in tried if row["dtype"] == "float16"} == {"slow"}
    assert [rate["dtype"] for rate in report["rates"]] == ["copy", *DTYPES]
    assert all(rate["per_s"] > 1e6 for rate in report["rates"])
    disk = report["disk"]
    assert disk["bytes_per_s"] > 0
    assert disk["checkpoints_that_fit"] == disk["free_bytes"] // disk["checkpoint_bytes"]


def test_an_idle_gpu_is_a_warning_where_the_cpu_may_train(sound):
    report = json.loads(sound)
    report["machine"]["gpus"] = [T4 | {"name": "Tesla P100", "capability": [6, 0]}]
    report["torch"] |= {"version": "2.13.0+cpu", "cuda": "", "cuda_available": False}
    severity, text = told(report)
    assert severity == "warning"
    assert "a build for CPUs. Install one with kernels for it: pip install torch==2.13.0" in text
    report["machine"]["gpus"][0]["capability"] = None
    assert told(report)[1].endswith("https://pytorch.org/get-started/locally")
    report["settings"]["device"] = "cpu"
    assert find_problems(report) == []


def test_a_simulated_card_is_compared_with_its_build_and_nothing_is_launched(picotron, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, _ = picotron(
        "doctor", "--device", "p100@2.13+cu130", "--run.dir", "file/runs", "--json"
    )
    report = json.loads(out)
    assert code == 1
    assert report["launches"] == report["rates"] == []
    wheel, folder = (problem["text"] for problem in report["problems"])
    assert "Tesla P100 has compute capability 6.0" in wheel
    assert "pip install torch==2.13.0" in wheel
    assert "/whl/cu126" in wheel
    assert folder == (
        f"Runs cannot be written to {tmp_path / 'file'}: Not a directory. "
        "Choose another folder with --run.dir."
    )


KERNELS = """
import os, signal
from picotron_core.registry import Backend, Code, Level, Reason, hookimpl

print("plugins may print")

def load():
    os.kill(os.getpid(), signal.SIGSEGV)

def supports(request):
    if request.dtype == "float32":
        return ()
    return (Reason(code=Code.DTYPE, detail="float32 only"),)

@hookimpl
def picotron_backends():
    yield Backend(op="norm", name="fatal", level=Level.SPECIALIZED, load=load,
                  supports=supports)
"""


def test_plugins_that_kill_a_process_are_quarantined_and_the_doctor_goes_on(
    put, picotron, monkeypatch, tmp_path
):
    put("acme_kernels.py", KERNELS)
    put("broken_kernels.py", "raise ImportError('no libacme.so')")
    put("idle_kernels.py", "raise SystemExit('imported without being enabled')")
    put("deadly_kernels.py", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    for name in ("acme", "broken", "deadly", "idle"):
        info = f"{name}-1.5.dist-info"
        put(f"{info}/METADATA", f"Name: {name}-dist\nVersion: 1.5\n")
        folder = put(f"{info}/entry_points.txt", f"[picotron]\n{name} = {name}_kernels\n")
    monkeypatch.syspath_prepend(folder)
    arguments = ["--device", "cpu", "--data.cache_dir", str(tmp_path / "cache")]
    arguments += [word for name in ("acme", "broken", "deadly") for word in ("--plugin", name)]
    code, out, _ = picotron("doctor", *arguments, "--train.dtype", "float32", "--json")
    report = json.loads(out)
    assert {p["plugin"]: p["status"] for p in report["plugins"]} == {
        **{"acme": "active", "broken": "quarantined", "deadly": "quarantined", "idle": "inactive"}
    }
    bad = [row for row in report["launches"] if row["status"] == "quarantined"]
    assert [(row["backend"], row["dtype"]) for row in bad] == [("acme/fatal", "float32")]
    assert (report["deaths"], report["complete"]) == ([], True)
    others = [row for row in report["launches"] if row not in bad]
    assert len(others) == len({(row["backend"], row["op"], row["dtype"]) for row in others}) > 30
    kernel, broken, deadly = (problem["text"] for problem in report["problems"])
    assert kernel.startswith(
        "norm by acme/fatal in float32 on cpu: quarantined: it died of SIGSEGV in load"
    )
    assert kernel.endswith("passed over; `picotron quarantine clear acme` has it tried again.")
    assert "Plugin 'broken' is quarantined: ImportError: no libacme.so. Reinstall" in broken
    assert "Plugin 'deadly' is quarantined: it died of SIGILL" in deadly
    assert code == 0  # a run would do without them
    kept = picotron("quarantine", "list", "--data.cache_dir", str(tmp_path / "cache"))[1]
    assert "SIGSEGV" in kept
    assert "SIGILL" in kept


def stub(source: str) -> list[str]:
    prelude = (
        "import json, sys, os, time\n"
        "def say(**record):\n"
        "    with open(sys.argv[2], 'a') as file: file.write(json.dumps(record) + '\\n')\n"
        "task = json.load(open(sys.argv[1]))\n"
    )
    return [sys.executable, "-c", prelude + textwrap.dedent(source)]


def test_a_child_that_hangs_is_cut_and_the_next_goes_on():
    findings = examine_in_children(
        Task(config={}),
        stub("""
            if not task["settled"]:
                say(begin="launch", place="cpu", op="norm", backend="a/b", dtype="float32")
                time.sleep(600)
            say(done="end")
        """),
        silence_s=0.5,
    )
    (death,) = findings.deaths
    assert death.cause == "gave no sign of life for 0.5 s"
    assert findings.complete


def test_a_child_with_a_poisoned_device_is_followed_by_a_fresh_one():
    findings = examine_in_children(
        Task(config={}),
        stub("""
            for op in ("norm", "rope"):
                row = dict(place="cuda:0", op=op, backend="a/b", dtype="float32")
                if f"cuda:0/{op}/a/b/float32" not in task["settled"]:
                    say(begin="launch", **row)
                    say(done="launch", **row)
                    say(done="again")
                    sys.exit()
            say(done="end")
            os.abort()
        """),
    )
    assert [record["op"] for record in findings.of("launch")] == ["norm", "rope"]
    assert (findings.deaths, findings.complete) == ([], True)


def test_a_child_that_only_dies_does_not_go_on_for_ever():
    findings = examine_in_children(Task(config={}), stub("say(begin='plugins'); os._exit(0)"))
    assert 1 < len(findings.deaths) <= 8
    assert findings.deaths[0].cause == "ended with exit code 0"
    assert not findings.complete


def test_an_older_nvidia_smi_and_one_without_a_driver(nvidia_smi):
    nvidia_smi(
        'case "$1" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field"; exit 2;; '
        'esac; echo "GeForce GTX 1080, 450.80.02, [N/A]"'
    )
    (gpu,), error = ask_nvidia_smi()
    assert (gpu.name, gpu.capability, gpu.memory_bytes, error) == ("GeForce GTX 1080", None, 0, "")
    nvidia_smi('echo "NVIDIA-SMI has failed because it could not reach the driver."; exit 9')
    gpus, error = ask_nvidia_smi()
    assert (gpus, error) == ((), "NVIDIA-SMI has failed because it could not reach the driver.")


def test_the_disk_is_left_as_it_was(tmp_path):
    disk = try_disk(tmp_path / "not" / "yet" / "there")
    assert disk.folder == str(tmp_path)
    assert disk.written_bytes > 0
    assert disk.bytes_per_s
    assert list(tmp_path.iterdir()) == []


def test_a_driver_too_old_for_the_build(sound):
    report = json.loads(sound)
    report["machine"]["gpus"] = [T4]
    says = "The NVIDIA driver on your system is too old (found version 12020)."
    report["torch"] |= {"version": "2.13.0+cu130", "cuda": "13.0", "cuda_says": says}
    severity, text = told(report)
    assert severity == "warning"
    assert says in text
    assert "Update the driver (535.1), or install a build that asks less of it: pip in" in text
    assert text.endswith("/whl/cu126")
    report["settings"]["device"] = "cuda"
    report["torch"] |= {"version": "2.13.0+cu126", "cuda": "12.6"}
    severity, text = told(report)
    assert severity == "error"
    assert text.endswith("Update the driver (535.1).")


def test_a_card_without_a_driver_and_no_card_at_all(sound):
    report = json.loads(sound)
    report["machine"] |= {"gpus": [], "gpu_error": "", "nvidia_cards": 1}
    report["torch"]["cuda_available"] = False
    assert told(report)[1].endswith("Install NVIDIA's driver for it.")
    report["machine"]["gpu_error"] = "NVIDIA-SMI has failed."
    assert "nvidia-smi cannot list the GPUs: NVIDIA-SMI has failed. Rein" in told(report)[1]
    report["machine"] |= {"gpu_error": "", "nvidia_cards": 0}
    assert find_problems(report) == []
    report["settings"]["device"] = "cuda"
    assert told(report)[0] == "error"


def test_a_cpu_that_cannot_import_torch(sound):
    report = json.loads(sound)
    report["torch"]["version"] = ""
    report["machine"] |= {"architecture": "x86_64", "cpu_features": ["avx"]}
    report["deaths"] = [{"doing": {"begin": "torch"}, "cause": "died of SIGILL", "evidence": ""}]
    severity, text = told(report)
    assert severity == "error"
    assert "died of SIGILL: This CPU has no SSE 4.1" in text


@pytest.mark.parametrize(
    ("fit", "rate", "severity", "fix"),
    [
        (0, 1e9, "error", "Free some, or choose another disk with --run.dir."),
        (2, 1e9, "warning", "Free some, or lower --checkpoint.keep."),
        (9, 1e7, "warning", "Save less often with --checkpoint.every, or use --run.dir."),
    ],
)
def test_a_disk_that_is_small_or_slow(sound, fit, rate, severity, fix):
    report = json.loads(sound)
    report["disk"] |= {"checkpoint_bytes": 10**9, "checkpoints_that_fit": fit, "bytes_per_s": rate}
    found, text = told(report)
    assert (found, text.endswith(fix)) == (severity, True)


def test_a_kernel_that_fails_is_passed_over_but_not_the_last_one(sound):
    report = json.loads(sound)
    row = {"place": "cuda:0", "op": "norm", "dtype": "float16", "needed": True, "detail": "no"}
    first = row | {"backend": "picotron/torch-fused", "turn": 0, "status": "failed"}
    second = row | {"backend": "picotron/naive-math", "turn": 1, "status": "ok"}
    report["launches"] = [first, second]
    assert told(report) == (
        "warning",
        "norm by picotron/torch-fused in float16 on cuda:0: no. It is passed over; update the "
        "package that it comes from.",
    )
    report["launches"] = [first | {"status": "quarantined", "detail": "quarantined: no"}, second]
    assert told(report)[0] == "warning"
    report["launches"] = [first | {"status": "died"}, second]
    severity, text = told(report)
    assert (severity, text.endswith("Use --backends norm=naive-math.")) == ("error", True)
    report["launches"] = [first, second | {"status": "failed"}]
    assert [problem.severity for problem in find_problems(report)] == ["error", "warning"]
    report["launches"] = [first, second | {"status": "died"}]
    assert [problem.severity for problem in find_problems(report)] == ["error", "warning"]
    report["launches"] = [first, second | {"turn": None}]  # named alone: nobody follows
    assert told(report)[1].endswith("Use --backends norm=naive-math.")


def test_the_wheel_check_is_an_error_for_the_device_that_would_train(sound):
    report = json.loads(sound)
    refused = {**report["devices"][0], "refused": "torch has no kernels for it. Install one."}
    report["devices"] = [refused | {"chosen": True}]
    assert told(report) == ("error", "torch has no kernels for it. Install one.")
    report["devices"] = [refused | {"chosen": False}]
    assert told(report)[0] == "warning"


def test_wrong_settings_are_problems_with_their_fix(picotron):
    code, out, _ = picotron("doctor", "--device", "cpu", "--backends", "norm=sdpa", "--json")
    (problem,) = json.loads(out)["problems"]
    assert code == 1
    assert "no backend 'sdpa' for op 'norm'" in problem["text"]
    assert picotron("doctor", "--device", "t44")[2].endswith("Did you mean 't4'?\n")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--device", "t4", "--train.dtype", "bfloat16"), "Use --train.dtype float16"),
        (("--device", "p100", "--backends", "attention=nonsense"), "nonsense"),
    ],
)
def test_a_card_that_is_not_here_is_judged_by_its_dtype_and_its_backends(picotron, flags, told):
    code, out, _ = picotron("doctor", *flags, "--json")
    assert code == 1
    assert any(told in problem["text"] for problem in json.loads(out)["problems"])
