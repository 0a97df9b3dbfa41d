"""`picotron conformance`: a report to read, a certificate to verify. The core calls it by name."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from picotron_core.errors import ConfigError, PicotronError, did_you_mean
from picotron_core.files import replace_text

VERIFY = "verify"
_MARKS = {"good": "ok  ", "bad": "BAD ", "note": "note"}


def run(words: Sequence[str], *, html: Path | None = None, markdown: bool = False) -> int:
    """The words of the command line after `picotron conformance`; returns the exit code."""
    if words[0] == VERIFY and len(words) == 2:
        if html or markdown:
            raise ConfigError(f"--html and --markdown are of a report; {VERIFY} takes neither.")
        return verify_certificate(Path(words[1]))
    if words[0] == VERIFY:
        raise ConfigError("verify takes one certificate: picotron conformance verify CERT.json")
    if len(words) > 1:
        raise ConfigError(
            f"{words[0]!r} is no command. {did_you_mean(words[0], [VERIFY])} For a report give its "
            "file alone: picotron conformance REPORT.json"
        )
    return show_report(Path(words[0]), html=html, markdown=markdown)


def show_report(path: Path, *, html: Path | None, markdown: bool) -> int:
    """Print the matrix, or write the page, or both. What it shows does not change the exit code."""
    from picotron_conformance.markdown import as_markdown
    from picotron_conformance.page import as_page
    from picotron_conformance.report import read_report

    report = read_report(path)
    if html is not None:
        if not html.parent.is_dir():
            raise ConfigError(f"--html {html}: there is no folder {html.parent}. Make it first.")
        replace_text(html, as_page(report))
    if html is None or markdown:
        print(as_markdown(report), end="")
    else:
        print(f"Wrote {html}: open it in a browser.")
    return 0


def verify_certificate(path: Path) -> int:
    """Print a line a finding, then what would prove it anew."""
    from picotron_conformance.markdown import one_line
    from picotron_conformance.verify import again, is_valid, verify

    certificate, findings = verify(path)
    for finding in findings:
        print(f"{_MARKS[finding.kind]}  {one_line(finding.text)}")
    if not is_valid(findings):
        print(f"\n{path} is not valid for what is installed here.")
        return PicotronError.exit_code
    print(f"\n{path} is valid. To prove it anew:\n")
    print(f"  {one_line(again(certificate, seed=secrets.randbelow(2**31)))}")
    return 0
