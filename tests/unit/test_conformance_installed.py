"""What a certificate is bound to: everything a kernel rests on, wherever it is installed, as the
registry and Python would load it now.
"""

import json
import os
import py_compile
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import cache_from_source
from py_compile import PycInvalidationMode

import pytest
from picotron_conformance.certificate import issue, write_certificate
from picotron_conformance.differences import Now
from picotron_conformance.imports import Imports
from picotron_conformance.installed import Installed
from picotron_conformance.report import read_report
from picotron_conformance.session import rest_on
from picotron_conformance.verify import verify

from picotron_core.errors import ConfigError
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.sources import LOOP, package_files

KEY = "norm=acme/fast"
RIGHT = """
def rms_norm(x, weight, *, eps):
    exact = x.float()
    return (exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight
"""
SITE = {
    # The kernel is one line here; what computes lies elsewhere, and so does what it calls.
    "acme/__init__.py": """
from picotron_core.registry import Backend, Level, hookimpl, kernel_from

@hookimpl
def picotron_backends():
    yield Backend(op="norm", name="fast", level=Level.PORTABLE, supports=lambda request: (),
                  load=kernel_from("acme.norm:rms_norm"), requires=("acme-kernels>=2", "torch"))
""",
    "acme/norm.py": "import numpy\nfrom acme_fast.impl import rms_norm\n",
    "acme-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1\n",
    "acme-1.dist-info/entry_points.txt": "[picotron]\nacme = acme\n",
    "acme_fast/__init__.py": "",
    "acme_fast/impl.py": RIGHT.replace("exact = x", "import acme_late.more\n    exact = x"),
    "acme_late/__init__.py": "",
    "acme_late/more.py": "",
    "acme_lib/table.txt": "1 2\n",
    "acme_kernels-2.1.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: acme-kernels\nVersion: 2.1\n"
    ),
    "acme_kernels-2.1.dist-info/RECORD": "acme_lib/table.txt,,\nacme_late/__init__.py,,\n",
    "evil/__init__.py": "",
    "preload.py": "import acme_fast.impl, acme_late.more\n",
}


def prove(folder, site, *options):
    """A real session of a few checks -> its report."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--pyargs", "picotron_conformance"),
            *("--picotron-backend", KEY, "--picotron-report", "report.json"),
            *("-k", "forward-float32-E123", "-p", "no:cacheprovider", *options),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    return read_report(folder / "report.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    for path, text in SITE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture(scope="module")
def report(original, tmp_path_factory):
    return prove(tmp_path_factory.mktemp("run"), original)


@pytest.fixture
def site(original, tmp_path, monkeypatch):
    """A copy to change, first on the path."""
    folder = tmp_path / "site"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def certificate(tmp_path, site, report):
    """As if these few checks had been a whole full profile."""
    path = tmp_path / "cert.json"
    passed = [check for check in report.checks if check.verdict == "PASS"]
    write_certificate(path, replace(report.session, profile="full", complete=True), passed)
    return path


def bad(path):
    """Of the backend; the suite itself may be edited while its tests run."""
    texts = [finding.text for finding in verify(path)[1] if finding.kind == "bad"]
    return [text for text in texts if text.startswith(KEY)]


def rested_on(report):
    (backend,) = report.session.backends
    return {(i.name, i.package): (i.version, sorted(i.files)) for i in backend.rests_on}


def test_all_that_a_kernel_rests_on_is_recorded(report):
    found = rested_on(report)
    kernels = ["acme_late/__init__.py", "acme_lib/table.txt"]
    assert found.pop(("acme-kernels", "")) == ("2.1", kernels)  # required, and never imported
    late = found.pop(("acme-kernels", "acme_late"))  # imported by a call
    assert late == ("2.1", [kernels[0], "acme_late/more.py", kernels[1]])
    assert found.pop(("acme_fast", "acme_fast")) == (
        "",
        ["acme_fast/__init__.py", "acme_fast/impl.py"],
    )
    version, files = found.pop(("numpy", "numpy"))  # comes with Picotron: its version is enough
    assert version[0].isdigit()
    assert files == found.pop(("torch", ""))[1] == []
    assert found == {}
    assert report.session.backends[0].entry_point == "acme"


def test_what_was_there_before_is_recorded_too(report, original, tmp_path):
    """The modules are loaded by a plugin of pytest."""
    again = prove(tmp_path, original, "-p", "preload")
    missed = rested_on(report).keys() - rested_on(again).keys()
    assert missed == {("acme-kernels", "acme_late")}  # only a call's own import of it was new


def test_a_bundled_backend_rests_on_nothing_more():
    imports = Imports()
    with imports.watched(load_registry().candidates[0]) as found:
        pass
    assert found == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("acme_fast/impl.py", "def rms_norm(x, w, *, eps): return x * 0\n", "acme_fast/impl.py ch"),
        ("acme_late/more.py", "x = 1\n", "acme_late/more.py changed"),
        ("acme_late/new.py", "", "acme_late/new.py added"),
        ("acme_lib/table.txt", "1 3\n", "acme_lib/table.txt changed"),
        ("acme_kernels-2.1.dist-info/METADATA", "Name: acme-kernels\nVersion: 3\n", "3 is inst"),
        ("acme_kernels-2.1.dist-info/METADATA", "", "acme-kernels is not installed"),
        ("acme-1.dist-info/entry_points.txt", "[picotron]\nacme = evil\n", "'evil' here; cert"),
        ("acme-1.dist-info/entry_points.txt", "[picotron]\n", "no distribution provides"),
        ("acme-1.dist-info/entry_points.txt", "[picotron]\nacme=acme\n[x]\ny=z\n", "points.txt ch"),
        ("b-1.dist-info/entry_points.txt", "[picotron]\nACME = evil\n", "more than one"),
        ("acme/norm.pyc", "forged", "acme/norm.pyc added"),
    ],
)
def test_a_change_of_any_of_it_is_named(certificate, site, path, text, words):
    assert bad(certificate) == []
    (site / path).parent.mkdir(exist_ok=True)
    (site / path).write_text(text)
    (site / path).with_name("METADATA").touch()
    found = bad(certificate)
    assert any(words in line for line in found), found


def test_another_version_of_what_comes_with_picotron_is_named(certificate, site):
    (site / "numpy-9.dist-info").mkdir()
    (site / "numpy-9.dist-info/METADATA").write_text("Name: numpy\nVersion: 9\n")
    (found,) = bad(certificate)
    assert "of what it rests on, numpy 9 is installed; certified is" in found


def test_what_two_workers_saw_differently_is_what_neither_can_certify(report, site):
    (backend,) = report.session.backends
    first = next(i for i in backend.rests_on if i.package == "acme_fast")
    later = replace(first, files={**first.files, "acme_fast/impl.py": "0" * 64})
    (both,) = rest_on(report.session, {KEY: [first, later]}).backends
    assert [i for i in both.rests_on if i.package == "acme_fast"] == [first, later]
    (line,) = Now().differences(both)
    assert "acme_fast/impl.py changed" in line


def test_what_says_too_little_is_not_certified(report):
    session = replace(report.session, profile="full", complete=True)
    passed = [check for check in report.checks if check.verdict == "PASS"]
    (backend,) = session.backends
    lost = Installed(distribution="", version="", package="built", files={})
    for changes, words in (
        ({"rests_on": (lost,)}, "it imported built, of which no file was found"),
        ({"files": {**backend.files, "acme/loop": LOOP}}, "acme/loop is a link to a folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            issue(replace(session, backends=(replace(backend, **changes),)), passed)
    with pytest.raises(ConfigError, match="No certificate: this and that"):
        issue(replace(session, objections=("this and that",)), passed)


# Bytecode and links.


def cache_of(source, **options):
    return py_compile.compile(str(source), doraise=True, **options)


@pytest.mark.parametrize("mode", ["TIMESTAMP", "CHECKED_HASH"])
def test_caches_that_python_made_are_no_change(certificate, site, mode):
    for optimize in (0, 1, 2):
        for source in site.rglob("*.py"):
            cache_of(source, invalidation_mode=PycInvalidationMode[mode], optimize=optimize)
    assert bad(certificate) == []


def forge(site, mode):
    """Another kernel's bytecode under the right source."""
    source = site / "acme_fast/impl.py"
    state, text = source.stat(), source.read_text()
    cache = cache_from_source(source)
    source.write_text("def rms_norm(x, w, *, eps): return x * 0\n".ljust(len(text), "#"))
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    cache_of(source, cfile=cache, invalidation_mode=PycInvalidationMode[mode])
    source.write_text(text)
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    return source, cache


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("UNCHECKED_HASH", "is run without a look at its source"),
        ("TIMESTAMP", "is not what its source compiles to"),
    ],
)
def test_forged_bytecode_is_named(certificate, site, mode, words):
    source, cache = forge(site, mode)
    script = "import acme_fast.impl as m; print(m.rms_norm(7, 0, eps=0))"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=site, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "0\n"  # Python does run it
    (found,) = bad(certificate)
    assert words in found
    assert cache in found
    later = time.time() + 10
    os.utime(source, (later, later))  # a cache that Python drops, for its source is newer
    assert bool(bad(certificate)) is (mode == "UNCHECKED_HASH")


def test_what_lies_behind_a_link_counts(certificate, site, tmp_path):
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside/kernel.py").write_text("x = 1\n")
    (site / "acme/linked").symlink_to(tmp_path / "aside")
    (found,) = bad(certificate)
    assert "acme/linked/kernel.py added" in found


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_link_that_leads_round_is_named_and_not_followed(certificate, site, target):
    (site / "acme/deep").mkdir()
    (site / "acme/deep/loop").symlink_to(target)
    assert package_files("acme")["acme/deep/loop"] == LOOP
    (found,) = bad(certificate)
    assert "acme/deep/loop added" in found


def test_the_note_says_what_it_cannot_see(certificate):
    note = json.loads(certificate.read_text())["note"]
    for word in ("no signature", "downloads", "conftest.py", "watched"):
        assert word in note
