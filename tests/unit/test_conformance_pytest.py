"""The suite among other plugins and settings of pytest: none can turn a failure into a pass, and
none can hide the suite without being named.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from picotron_conformance.answers import Answers
from picotron_conformance.check import Outcome, Verdict

ROOT = Path(__file__).parents[2]
ID = "norm=acme/{}-forward-float32-E123"
KERNELS = """
import os
from picotron_core.registry import Backend, Level, hookimpl

calls = []

def right(x, weight, *, eps):
    exact = x.float()
    return (exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight

def flaky(x, weight, *, eps):
    calls.append(x)
    return right(x, weight, eps=eps) * (2 if len(calls) == 1 else 1)

def elsewhere(x, weight, *, eps):
    import acme_helper
    return right(x, weight, eps=eps) * (2 if os.environ["PYTEST_XDIST_WORKER"] == "gw0" else 1)

def dies(x, weight, *, eps):
    os._exit(3) if os.environ["PYTEST_XDIST_WORKER"] == "gw0" else None
    return right(x, weight, eps=eps)

@hookimpl
def picotron_backends():
    for kernel in (right, flaky, elsewhere, dies):
        yield Backend(op="norm", name=kernel.__name__, level=Level.PORTABLE,
                      load=lambda kernel=kernel: kernel, supports=lambda request: ())
"""
# What pytest-rerunfailures does, and worse: only the last run is told.
RERUN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed for report in reports):
        item.user_properties.clear()
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    return True
"""
STOP = """
import pytest

@pytest.fixture(autouse=True)
def stop():
    pytest.skip("not on Mondays")
"""


@pytest.fixture
def prove(tmp_path):
    """A real session in a folder of its own -> its result, and its report."""
    for path, text in {
        "acme.py": KERNELS,
        "acme_helper.py": "",
        "again.py": RERUN,
        "stop.py": STOP,
        "acme-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1\n",
        "acme-1.dist-info/entry_points.txt": "[picotron]\nacme = acme\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    def prove(kernel, *options, addopts=""):
        result = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "--pyargs", "picotron_conformance"),
                *("--picotron-backend", f"norm=acme/{kernel}", "--picotron-report", "report.json"),
                *("-p", "no:cacheprovider", *options),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": addopts},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (tmp_path / "report.json").exists(), result.stdout + result.stderr
        return result, json.loads((tmp_path / "report.json").read_text())

    return prove


def verdict_of(report, kernel):
    (found,) = (check for check in report["checks"] if check["id"] == ID.format(kernel))
    return found["verdict"], found["detail"]


def test_a_rerun_that_passes_does_not_undo_a_failure(prove):
    result, report = prove("flaky", "-k", "forward-float32-E123", "-p", "again")
    assert "1 passed" in result.stdout  # so pytest was told
    assert result.returncode == 1
    assert verdict_of(report, "flaky")[0] == "FAIL"
    (objection,) = report["session"]["objections"]
    assert f"{ID.format('flaky')} was asked more than once" in objection
    assert "answered FAIL, then PASS" in objection
    assert objection in result.stdout


def test_one_worker_that_passes_does_not_talk_over_another(prove):
    """--dist each asks every check in every worker; one finds a failure, and then dies."""
    options = ("-k", "forward-float32-E123", "--dist", "each", "--tx", "2*popen")
    result, report = prove("elsewhere", "--picotron-backend", "norm=acme/dies", *options)
    assert result.returncode == 1
    assert verdict_of(report, "elsewhere")[0] == "FAIL"
    verdict, detail = verdict_of(report, "dies")
    assert verdict == "ERROR"
    assert "it killed its process" in detail
    objections = report["session"]["objections"]
    assert len(objections) == 2
    assert all("was asked more than once" in objection for objection in objections)
    resting = {
        b["name"]: [i["package"] for i in b["rests_on"]] for b in report["session"]["backends"]
    }
    assert resting == {"acme/elsewhere": ["acme_helper"], "acme/dies": []}


@pytest.mark.parametrize("order", [0, 1])
def test_the_worst_answer_stays(order):
    def made(verdict):
        common = {"op": "norm", "backend": "a/b", "check": "c", "case": "", "dtype": ""}
        return Outcome(id="x", aspect="exact", verdict=verdict, **common)

    alike = Answers()
    for _ in range(3):
        alike.add(made(Verdict.PASS))
    assert list(alike.contradictions()) == []
    for worse in (Verdict.FAIL, Verdict.ERROR, Verdict.TIMEOUT, Verdict.UNSUPPORTED):
        answers = Answers()
        for verdict in (worse, Verdict.PASS)[:: -1 if order else 1]:
            answers.add(made(verdict))
        assert answers.worst["x"].verdict is worse
        assert len(list(answers.contradictions())) == 1


def test_a_project_that_names_its_tests_otherwise_finds_the_suite(prove, tmp_path):
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_files = check_*.py\npython_functions = check_*\n"
        "addopts = --doctest-modules --strict-markers\n"
    )
    result, report = prove("right", "-k", "forward-float32-E123")
    assert result.returncode == 0, result.stdout
    assert verdict_of(report, "right")[0] == "PASS"
    # And nothing else was collected.
    assert f"1 passed, {len(report['checks']) - 1} deselected" in result.stdout


def test_options_from_the_environment_count_as_any(prove, tmp_path):
    result, report = prove(
        *("right", "--picotron-profile", "full", "--picotron-certificate", "cert.json"),
        addopts="-k forward-float32-E123 -p stop",
    )
    assert result.returncode == 1
    assert "No certificate: some planned checks were deselected" in result.stdout
    assert not (tmp_path / "cert.json").exists()
    verdict, detail = verdict_of(report, "right")
    assert verdict == "NOT_RUN"
    assert detail.startswith("pytest did not come to ask it: ")
    assert "not on Mondays" in detail
    others = [check for check in report["checks"] if check["id"] != ID.format("right")]
    assert {check["detail"] for check in others} == {"deselected"}


def test_why_nothing_was_collected_is_said(prove):
    result, report = prove("right", "--ignore-glob=/*/test_backend.py")
    assert result.returncode != 0
    verdict, detail = verdict_of(report, "right")
    assert verdict == "NOT_RUN"
    assert "pytest collected nothing of" in detail
    assert "No check was executed" in result.stdout


def test_an_option_of_a_plugin_that_is_not_there_is_pytests_own_error(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "picotron_conformance", "--cov=acme"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 4
    assert "unrecognized arguments: --cov=acme" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_wheel_has_every_file_of_the_suite(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if "picotron_conformance/" in name}
    folder = ROOT / "conformance"
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    files = {path.relative_to(folder).as_posix() for path in paths}
    assert {"page.css", "py.typed", "test_backend.py"} <= {Path(name).name for name in files}
    assert packed == files
