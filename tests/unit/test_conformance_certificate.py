"""The certificate: only a full and clean session earns one, and no change of it goes unseen."""

import copy
import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from picotron_conformance.certificate import issue, write_certificate
from picotron_conformance.check import Verdict
from picotron_conformance.run import run_checks
from picotron_conformance.session import gather_session
from picotron_conformance.verify import again, is_valid, verify

from picotron_core.errors import ConfigError, PicotronError
from picotron_core.hardware import look, profile
from picotron_core.registry.plugins import load_registry
from picotron_core.registry.types import Candidate, Provider

KEY = "norm=acme/fast"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An installed distribution, with a plugin that declares a kernel in a package of its own."""
    folder = tmp_path / "site"
    info = folder / "acme_kernels-2.1.0.dist-info"
    for path, text in {
        "acme_kernels/__init__.py": "",
        "acme_kernels/fast.py": "fast = 1\n",
        "acme_data/table.txt": "1 2 3\n",
        "../bin/acme": "#!/of/this/machine/python\n",
        f"{info.name}/METADATA": "Metadata-Version: 2.1\nName: acme-kernels\nVersion: 2.1.0\n",
        f"{info.name}/entry_points.txt": "[picotron]\nacme = acme_kernels\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    recorded = ["acme_kernels/__init__.py", "acme_kernels/fast.py", "acme_data/table.txt"]
    lines = [f"{path},," for path in (*recorded, "../bin/acme", f"{info.name}/RECORD")]
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="module")
def candidate():
    (naive,) = (
        candidate
        for candidate in load_registry().candidates
        if (candidate.backend.op, candidate.backend.name) == ("norm", "naive-math")
    )
    provider = Provider(plugin="acme", distribution="acme-kernels", version="2.1.0")
    return Candidate(backend=replace(naive.backend, name="fast"), provider=provider)


@pytest.fixture(scope="module")
def passed(candidate):
    """Real outcomes, and one that is not claimed."""
    found = run_checks(candidate, device=look("cpu"), profile="quick", seed=2, only={"forward"})
    last = replace(
        found[-1],
        id=f"{KEY}-forward-float64-plain",
        dtype="float64",
        verdict=Verdict.UNSUPPORTED,
        detail="no float64",
        measurements=(),
    )
    return [*found, last]


@pytest.fixture
def session(site, candidate):
    return gather_session(
        [candidate],
        device=look("cpu"),
        profile="full",
        seed=2,
        complete=True,
        started=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    )


@pytest.fixture
def certificate(tmp_path, session, passed):
    path = tmp_path / "cert.json"
    write_certificate(path, session, passed)
    return path


def bad(path):
    return [finding.text for finding in verify(path)[1] if finding.kind == "bad"]


def test_it_says_what_was_proven_and_what_was_not(session, passed):
    found = issue(session, passed)
    (backend,) = found["backends"]
    assert found["issued"] == "2026-01-02T03:04:05+00:00"
    assert "no signature" in found["note"]
    assert backend["checks"]["PASS"] == len(passed) - 1
    assert sum(backend["passed"]["forward"].values()) == len(passed) - 1
    assert backend["skips"] == [{"verdict": "UNSUPPORTED", "detail": "no float64", "count": 1}]
    assert 0 < backend["worst"]["element"] <= 1
    assert "dtypes: float64" in backend["not_tested"]
    assert set(backend["files"]) == {
        *("acme_kernels/__init__.py", "acme_kernels/fast.py", "acme_data/table.txt"),
        "entry_points.txt",
    }


def test_the_same_session_gives_the_same_bytes(tmp_path, certificate, session, passed):
    write_certificate(tmp_path / "again.json", session, list(passed))
    assert (tmp_path / "again.json").read_bytes() == certificate.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"profile": "quick"}, "this was 'quick'. Run with --picotron-profile full"),
        ({"complete": False}, "without -k"),
        ({"backends": ()}, "no backend was tested"),
    ],
)
def test_a_session_that_proves_too_little_gets_none(session, passed, changes, words):
    with pytest.raises(ConfigError, match="No certificate: ") as refused:
        issue(replace(session, **changes), passed)
    assert words in str(refused.value)


@pytest.mark.parametrize("verdict", ["FAIL", "ERROR", "TIMEOUT", "NOT_RUN"])
def test_one_check_that_did_not_pass_is_enough(session, passed, verdict):
    outcomes = [*passed[:-1], replace(passed[-1], verdict=Verdict(verdict), detail="two\nlines")]
    with pytest.raises(ConfigError, match=f"1 of the {len(passed)} .* {verdict}, .* two lines$"):
        issue(session, outcomes)


def test_what_was_not_executed_or_not_found_is_not_certified(session, passed, candidate):
    with pytest.raises(ConfigError, match=f"no check of {KEY} was executed"):
        issue(session, passed[-1:])
    with pytest.raises(ConfigError, match=f"no check of {KEY} was executed"):
        issue(session, [])
    with pytest.raises(ConfigError, match="have one id"):
        issue(session, [*passed, passed[0]])
    with pytest.raises(ConfigError, match="which the session does not know"):
        issue(session, [*passed, replace(passed[0], backend="acme/other")])
    (backend,) = session.backends
    with pytest.raises(ConfigError, match="no file of"):
        issue(replace(session, backends=(replace(backend, files={}),)), passed)
    machine = replace(session.machine, device=profile("t4"))
    with pytest.raises(ConfigError, match="a profile of a card"):
        issue(replace(session, machine=machine), passed)


def test_nothing_is_written_where_there_is_none(tmp_path, session):
    with pytest.raises(ConfigError):
        write_certificate(tmp_path / "none.json", session, [])
    assert not (tmp_path / "none.json").exists()


def test_it_is_valid_where_it_was_issued(certificate):
    found, findings = verify(certificate)
    assert bad(certificate) == []
    assert is_valid(findings)
    assert [f.text for f in findings if KEY in f.text and "files that were certified" in f.text]
    words = shlex.split(again(found, seed=5))
    assert words[words.index("--picotron-backend") + 1] == KEY
    assert words[words.index("--picotron-seed") + 1] == "5"


def leaves(value, path=()):
    """Every place in a document, the containers too."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from leaves(item, (*path, key))


def flipped(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    return {} if value is None else {**value, "x": "x"}


def at(document, path):
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_change_of_any_field_is_seen(certificate, how):
    whole = json.loads(certificate.read_text())
    places = [path for path in leaves(whole) if path]
    assert len(places) > 60
    for path in places:
        document = copy.deepcopy(whole)
        holder = at(document, path[:-1])
        if how == "flip":
            holder[path[-1]] = flipped(holder[path[-1]])
        else:
            del holder[path[-1]]
        certificate.write_text(json.dumps(document))
        try:
            seen = bad(certificate)
        except PicotronError:
            continue
        assert seen, f"{how} of {path} went unseen"


def test_only_the_content_counts_not_how_it_is_laid_out(certificate):
    document = json.loads(certificate.read_text())
    certificate.write_text(json.dumps(dict(reversed(document.items()))))
    assert bad(certificate) == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("acme_kernels/fast.py", "fast = 2\n", "acme_kernels/fast.py changed"),
        ("acme_data/table.txt", "1 2 4\n", "acme_data/table.txt changed"),
        ("acme_data/table.txt", None, "acme_data/table.txt missing"),
        ("acme_kernels/late.py", "", "acme_kernels/late.py added"),
    ],
)
def test_a_changed_file_of_the_distribution_is_named(certificate, site, path, text, words):
    if text is None:
        (site / path).unlink()
    else:
        (site / path).write_text(text)
    (found,) = bad(certificate)
    assert words in found
    assert KEY in found


def test_caches_of_python_are_no_change(certificate, site):
    (site / "acme_kernels/__pycache__").mkdir()
    (site / "acme_kernels/__pycache__/fast.cpython-311.pyc").write_bytes(b"1")
    assert bad(certificate) == []


def test_another_version_or_none_is_said(certificate, site):
    metadata = site / "acme_kernels-2.1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("2.1.0", "2.2.0"))
    assert bad(certificate) == [f"{KEY}: acme-kernels 2.2.0 is installed; certified is 2.1.0"]
    (site / "acme_kernels-2.1.0.dist-info").rename(site / "gone")
    assert bad(certificate) == [f"{KEY}: acme-kernels is not installed here"]


def test_an_editable_install_counts_its_sources(site, candidate):
    info = site / "acme_kernels-2.1.0.dist-info"
    (info / "direct_url.json").write_text('{"url": "file:///src", "dir_info": {"editable": true}}')
    session = gather_session([candidate], device=look("cpu"), profile="full", seed=2)
    files = ["acme_kernels/__init__.py", "acme_kernels/fast.py", "entry_points.txt"]
    assert sorted(session.backends[0].files) == files


def test_another_suite_voids_it_and_another_machine_is_a_note(tmp_path, session, passed):
    machine = replace(session.machine, torch="2.6.0", cpu="another")
    path = tmp_path / "cert.json"
    other = replace(session, machine=machine, suite_sha256="0" * 64)
    write_certificate(path, other, passed)
    (found,) = bad(path)
    assert "issued with other suite" in found
    notes = [finding.text for finding in verify(path)[1] if finding.kind == "note"]
    assert [text for text in notes if "torch 2.6.0" in text]
    gpu = replace(machine, device=replace(profile("h100"), simulated=False))
    write_certificate(path, replace(session, machine=gpu), passed)
    assert bad(path) == []


def test_the_command_exits_by_the_answer(picotron, certificate, site):
    code, out, err = picotron("conformance", "verify", "cert.json")
    assert (code, err) == (0, "")
    assert "cert.json is valid" in out
    assert "pytest --pyargs picotron_conformance --picotron-backend norm=acme/fast" in out
    (site / "acme_kernels/fast.py").write_text("fast = 2\n")
    code, out, _ = picotron("conformance", "verify", "cert.json")
    assert code == 1
    assert "BAD" in out
    assert "cert.json is not valid" in out
    code, _, err = picotron("conformance", "verify", "cret.json")
    assert (code, err) == (2, "error: There is no file 'cret.json'. Did you mean 'cert.json'?\n")
    code, _, err = picotron("conformance", "verify", "cert.json", "--html", "x.html")
    assert code == 2
    assert "verify takes neither" in err


def test_a_certificate_cannot_command_the_terminal(picotron, tmp_path, session, passed):
    (backend,) = session.backends
    evil = replace(session, backends=(replace(backend, distribution="acme\x1b[2J"),))
    write_certificate(tmp_path / "evil.json", evil, passed)
    code, out, _ = picotron("conformance", "verify", "evil.json")
    assert code == 1
    assert "\x1b" not in out
