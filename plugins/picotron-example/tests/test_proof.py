"""The suite as an author of kernels meets it: an environment of its own, with the project's wheel
and this distribution installed, from an empty folder.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.parents[1]
KEY = "norm=example/one-pass"


class Author:
    """An environment and an empty folder to stand in."""

    def __init__(self, folder: Path) -> None:
        self.environment, self.folder = folder / "env", folder / "empty"
        self.folder.mkdir()
        venv.create(self.environment, with_pip=False)
        # Only what the project depends on is borrowed (torch alone is 200 MB); Picotron is not.
        (site,) = self.environment.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for source in (ROOT, PROJECT):
            command = [sys.executable, "-m", "pip", "--python", self.environment, "install", "-q"]
            options = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
            subprocess.run([*command, *options, source], check=True, capture_output=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PICOTRON_", "PYTEST_", "COV_"))
        }
        environment["PATH"] = f"{self.environment / 'bin'}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            [self.environment / "bin" / "python", "-m", *command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def prove(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("pytest", "--pyargs", "picotron_conformance", *options)


@pytest.fixture(scope="module")
def author(tmp_path_factory) -> Author:
    return Author(tmp_path_factory.mktemp("author"))


@pytest.fixture(scope="module")
def proof(author) -> subprocess.CompletedProcess[str]:
    return author.prove(
        *("-q", "--picotron-backend", KEY, "--picotron-report", "report.json"),
        *("-n", "2"),
    )


def test_the_suite_runs_from_the_wheel_and_the_example_passes(author, proof):
    assert proof.returncode == 0, proof.stdout[-3000:] + proof.stderr[-2000:]
    report = json.loads((author.folder / "report.json").read_text())
    counts = report["summary"][KEY]
    assert counts["PASS"] > 250
    assert not any(counts[verdict] for verdict in ("FAIL", "ERROR", "TIMEOUT", "NOT_RUN"))
    assert f"{KEY}: {counts['PASS']} PASS" in proof.stdout
    where = author.run("json.tool", "--help")  # the interpreter is the environment's own
    assert where.returncode == 0
    (backend,) = report["session"]["backends"]
    assert backend["distribution"] == "picotron-example"
    files = [path for path in backend["files"] if path.endswith("norm.py")]
    assert files == ["picotron_example/norm.py"]
    script = "import picotron_conformance as c; print(c.__file__)"
    python = author.environment / "bin" / "python"
    found = subprocess.run(
        [python, "-c", script], cwd=author.folder, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(author.environment)


def test_the_report_is_read_by_the_command(author, proof):
    shown = author.run("picotron_core.cli", "conformance", "report.json")
    assert shown.returncode == 0, shown.stderr
    assert f"`{KEY}`" in shown.stdout


def test_what_is_asked_alone_is_answered_alone(author, proof):
    """The command that a report gives for a check runs that check."""
    import shlex

    report = json.loads((author.folder / "report.json").read_text())
    check = next(check for check in report["checks"] if check["check"] == "gradient")
    program, *options = shlex.split(check["reproduce"])
    again = author.run(program, *options, "--picotron-report", "one.json")
    assert again.returncode == 0, again.stdout
    assert "1 passed" in again.stdout
    one = json.loads((author.folder / "one.json").read_text())
    (found,) = (c for c in one["checks"] if c["verdict"] != "NOT_RUN")
    assert (found["id"], found["measurements"]) == (check["id"], check["measurements"])
    assert one["session"]["complete"] is False


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "Say what to prove"),
        (("--picotron-backend", "norm=example/one_pas"), "Did you mean 'example/one-pass'?"),
        (("--picotron-backend", "norm=exmaple/one-pass"), "Did you mean 'example'?"),
        (("--picotron-report", "x.json"), "needs a --picotron-backend"),
    ],
)
def test_a_mistake_is_one_line(author, options, says):
    result = author.prove("-q", *options)
    assert result.returncode == 4
    said = result.stdout + result.stderr
    assert says in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) <= 4


def test_no_part_of_a_profile_earns_a_certificate(author):
    result = author.prove(
        *("-q", "--picotron-backend", KEY, "--picotron-profile", "full", "-k", "exact"),
        *("--picotron-certificate", "cert.json"),
    )
    assert result.returncode == 1
    assert "No certificate" in result.stdout
    assert not (author.folder / "cert.json").exists()


@pytest.mark.slow
def test_a_whole_full_profile_earns_one_that_holds_until_the_kernel_changes(author):
    result = author.prove(
        *("-q", "--picotron-backend", KEY, "--picotron-profile", "full", "-n", "2"),
        *("--picotron-certificate", "cert.json"),
    )
    assert result.returncode == 0, result.stdout[-3000:]
    verify = ("picotron_core.cli", "conformance", "verify", "cert.json")
    assert author.run(*verify).returncode == 0
    (kernel,) = author.environment.glob("lib/python*/site-packages/picotron_example/norm.py")
    kernel.write_text(kernel.read_text() + "\n# tuned\n")
    changed = author.run(*verify)
    assert changed.returncode == 1
    assert "picotron_example/norm.py changed" in changed.stdout
