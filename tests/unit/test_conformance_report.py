"""The report of the suite: what is written is what is read, and nobody can overlook a failure."""

import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from picotron_conformance.check import Measurement, Outcome, Verdict
from picotron_conformance.documents import FORMAT, REPORT, plain
from picotron_conformance.markdown import as_markdown, code
from picotron_conformance.page import as_page
from picotron_conformance.report import (
    failure,
    read_report,
    reproduce,
    summary,
    write_report,
)
from picotron_conformance.run import run_checks
from picotron_conformance.session import Session, gather_session

from picotron_core.errors import ConfigError, DamagedFileError
from picotron_core.hardware import look
from picotron_core.registry.plugins import load_registry

SEED = 11
EVIL = "<script>alert('x')</script> | `a` ``` [b](javascript:c) & \x1b[31m"


@pytest.fixture(scope="module")
def naive():
    (found,) = (
        candidate
        for candidate in load_registry().candidates
        if (candidate.backend.op, candidate.backend.name) == ("norm", "naive-math")
    )
    return found


@pytest.fixture(scope="module")
def session(naive) -> Session:
    named = ["norm=picotron/naive-math"]
    return gather_session([naive], device=look("cpu"), profile="quick", seed=SEED, named=named)


@pytest.fixture(scope="module")
def real(naive) -> list[Outcome]:
    """Outcomes as the suite makes them."""
    return run_checks(naive, device=look("cpu"), profile="quick", seed=SEED, only={"forward"})


def made(verdict: Verdict, **changes) -> Outcome:
    """One outcome of a kernel that does not exist."""
    check = Outcome(
        id=f"norm=acme/fast-gradient-float16-{verdict}",
        op="norm",
        backend="acme/fast",
        check="gradient",
        case=str(verdict),
        dtype="float16",
        aspect="gradient",
        verdict=verdict,
    )
    return replace(check, **changes)


def measured(**fractions: float) -> Measurement:
    return Measurement(
        result="dx",
        shape=(2, 3),
        dtype="float16",
        fractions=fractions,
        index=(1, 2),
        found=math.nan,
        wanted=-math.inf,
    )


@pytest.fixture(scope="module")
def mixed(real) -> list[Outcome]:
    """All verdicts, with the worst texts and numbers that a kernel could bring."""
    wrong = made(Verdict.FAIL, detail=EVIL, hint=EVIL, measurements=(measured(row=math.nan),))
    return [
        *real,
        wrong,
        made(Verdict.ERROR, detail="raised RuntimeError: boom", dtype=""),
        made(Verdict.TIMEOUT, detail="still running after 60 s"),
        made(Verdict.UNSUPPORTED, detail="it wants an even E", notes=("right",)),
        made(Verdict.NOT_RUN, detail="no second device"),
        made(Verdict.PASS, measurements=(measured(element=0.5, row=1.0),)),
    ]


@pytest.fixture
def written(tmp_path, session, mixed) -> Path:
    path = tmp_path / "report.json"
    write_report(path, session, mixed)
    return path


def test_what_is_written_is_what_is_read(written, session, mixed, real):
    report = read_report(written)
    assert report.session == session
    assert [replace(check, reproduce="") for check in report.checks[: len(real)]] == real
    assert plain([replace(check, reproduce="") for check in report.checks]) == plain(mixed)
    worst = report.checks[len(real)].measurements[0]
    assert math.isnan(worst.fractions["row"])
    assert math.isnan(worst.found)
    assert worst.wanted == -math.inf
    assert report.limits["element"].value > 0


def test_a_check_in_the_file_has_all_that_is_needed_to_see_it_again(written, real):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(written.read_text(), parse_constant=refuse)
    check = document["checks"][0]
    assert check["id"] == real[0].id
    assert check["seed"] == SEED
    assert check["sizes"] == dict(real[0].sizes)
    (measurement,) = check["measurements"]
    assert measurement["index"]
    assert set(measurement["fractions"]) <= set(document["limits"])
    assert document["summary"]["norm=acme/fast"] == dict.fromkeys(Verdict, 1)


def test_the_command_survives_a_shell(session):
    odd = made(Verdict.FAIL, id='norm=acme/fast-values-float16-it\'s $HOME; `x` "y"')
    words = shlex.split(reproduce(odd, session))
    assert words == [
        *("pytest", "--pyargs", f"picotron_conformance.test_backend::test_backend[{odd.id}]"),
        *("--picotron-backend", "norm=acme/fast", "--picotron-profile", "quick"),
        *("--picotron-seed", str(SEED), "--picotron-device", "cpu"),
    ]


def test_the_session_says_which_files_were_tested(session):
    (backend,) = session.backends
    assert backend.package == "picotron_backends"
    assert "picotron_backends/naive_math/norm.py" in backend.files
    assert not [path for path in backend.files if "__pycache__" in path]
    assert (backend.claims.level, backend.claims.tier) == ("reference", "A")
    assert re.fullmatch("[0-9a-f]{64}", session.suite_sha256)
    assert session.suite_sha256 != session.contracts_sha256
    assert session.machine.torch


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", DamagedFileError, "is no JSON"),
        ("[" * 100_000, DamagedFileError, "nested too deeply"),
        ('{"a": NaN}', DamagedFileError, "NaN is no number in JSON"),
        ('{"a": 1, "a": 2}', DamagedFileError, "'a' comes twice"),
        ("[]", ConfigError, "is no picotron conformance report"),
        ("{}", ConfigError, "Write one with: pytest --pyargs picotron_conformance"),
        ('{"kind": []}', ConfigError, "is no picotron conformance report"),
        (json.dumps({"kind": REPORT, "format": FORMAT + 1}), ConfigError, "Upgrade picotron"),
        (json.dumps({"kind": REPORT, "format": True}), DamagedFileError, "its format must be"),
        (json.dumps({"kind": REPORT, "format": FORMAT}), DamagedFileError, "'session'"),
    ],
)
def test_a_file_that_is_no_report_is_one_line_with_what_to_do(tmp_path, content, error, words):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(error) as caught:
        read_report(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_field_is_named(written):
    document = json.loads(written.read_text())
    document["checks"][0]["verdict"] = "GREAT"
    written.write_text(json.dumps(document))
    with pytest.raises(DamagedFileError, match=r"wrong field 'checks\.0\.verdict'.*'GREAT'"):
        read_report(written)


def test_a_file_beyond_the_bound_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "picotron_conformance.documents.read_document.__kwdefaults__", {"largest": 9}
    )
    path = tmp_path / "report.json"
    path.write_text('{"kind": 1}')
    with pytest.raises(ConfigError, match="MiB, which no"):
        read_report(path)


def test_failure_names_who_failed_and_how(real, mixed):
    assert failure(real) == ""
    assert failure(mixed) == (
        "1 of 2 backends failed: norm=acme/fast (1 FAIL, 1 ERROR, 1 TIMEOUT)."
    )
    assert summary(real) == {
        "norm=picotron/naive-math": dict.fromkeys(Verdict, 0) | {Verdict.PASS: len(real)}
    }


def test_nothing_executed_is_a_failure(real):
    skipped = [made(Verdict.UNSUPPORTED, detail="it wants a GPU"), made(Verdict.NOT_RUN)]
    assert "nothing is proven: there was none to ask" in failure([])
    assert "1 UNSUPPORTED, 1 NOT_RUN. Mostly because: it wants a GPU" in failure(skipped)
    assert failure([*real, *skipped]) == ""
    asked = failure([*real, *skipped], named=["norm=acme/fast"])
    assert "No check of norm=acme/fast was executed" in asked
    assert "No check of norm=acme/gone" in failure(real, named=["norm=acme/gone"])


def test_the_markdown_shows_every_verdict_and_failure(written, mixed):
    text = as_markdown(read_report(written))
    for verdict in Verdict:
        assert verdict in text
    assert "1 of 2 backends failed" in text
    for check in mixed:
        if check.verdict in ("FAIL", "ERROR", "TIMEOUT"):
            assert f"{check.verdict} `{check.id}`" in text
            assert reproduce(check, read_report(written).session) in text
    assert "**2 of 3 FAILED** infinite" in text
    assert "(1 unsupported, 1 not run)" in text
    assert "it wants an even E" in text
    assert "\x1b" not in text  # which would command a terminal
    (evil,) = (line for line in text.splitlines() if line.startswith("broke:      <script>"))
    before = text[: text.index(evil)].splitlines()
    assert before[-1] == "````text"  # a fence longer than any run inside it


def test_a_table_holds_any_text():
    assert code("a|b") == "`a\\|b`"
    assert code("a `b` c") == "``a `b` c``"
    assert code("`") == "`` ` ``"
    assert code(" two\nlines ") == "`two lines`"
    assert code("") == ""


class Page(HTMLParser):
    """What a browser would make of it: the text, the tags, and whether they nest."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.open, self.targets, self.ids = "", [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.targets += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        assert not [name for name in found if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_runs_nothing(written, mixed):
    text = as_page(read_report(written))
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "http" not in text
    assert "url(" not in text
    assert EVIL in page.text
    assert {target.removeprefix("#") for target in page.targets} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for verdict in Verdict:
        assert verdict in page.text
    assert "2 of 3 failed" in page.text
    assert "beyond any limit" in page.text
    for check in mixed:
        if check.verdict in ("FAIL", "ERROR", "TIMEOUT"):
            assert check.id in page.text


def test_a_good_report_says_so(tmp_path, session, real):
    path = tmp_path / "report.json"
    write_report(path, session, real)
    report = read_report(path)
    sentence = f"The backend passed all {len(real)} checks that were executed."
    assert sentence in as_markdown(report)
    assert sentence in Page(as_page(report)).text
    assert "Failures" not in as_markdown(report)
    assert 'class="fail"' not in as_page(report)
    write_report(path, session, [])
    assert "No check was executed" in as_markdown(read_report(path))
    assert "It was asked nothing." in Page(as_page(read_report(path))).text


def test_the_command_prints_the_matrix_or_writes_the_page(picotron, written):
    code, out, err = picotron("conformance", str(written))
    assert (code, err) == (0, "")
    assert out == as_markdown(read_report(written))
    code, out, _ = picotron("conformance", str(written), "--html", "page.html")
    assert (code, out) == (0, "Wrote page.html: open it in a browser.\n")
    assert (written.parent / "page.html").read_text() == as_page(read_report(written))
    code, out, _ = picotron("conformance", "report.json", "--markdown", "--html", "page.html")
    assert (code, out) == (0, as_markdown(read_report(written)))


def test_the_command_says_what_was_mistyped(picotron, written):
    code, out, err = picotron("conformance")
    assert "REPORT.json | verify CERTIFICATE.json" in out + err
    code, _, err = picotron("conformance", "reprot.json")
    assert (code, err) == (
        2,
        "error: There is no file 'reprot.json'. Did you mean 'report.json'?\n",
    )
    code, _, err = picotron("conformance", "verfy", "report.json")
    assert code == 2
    assert "Did you mean 'verify'?" in err
    code, _, err = picotron("conformance", "verify")
    assert code == 2
    assert "verify takes one certificate" in err
    code, _, err = picotron("conformance", "verify", "report.json")
    assert code == 2
    assert "It is a picotron conformance report: picotron conformance report.json" in err
    code, _, err = picotron("conformance", "report.json", "--html", "nowhere/page.html")
    assert code == 2
    assert "there is no folder nowhere" in err
    code, _, err = picotron("conformance", ".")
    assert code == 2
    assert "is a folder" in err
