"""Standard output and error while a command runs: any text can be printed, and what libraries say
beside the command is one line each.
"""

from __future__ import annotations

import io
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from picotron_core.errors import one_line, reason


@contextmanager
def printable_streams(*, debug: bool) -> Iterator[None]:
    """While this lasts, characters that a stream cannot encode are printed as escapes, and an
    exception in a thread, one that Python ignores, and a warning are one line on standard error.

    Names of files may hold bytes that are not UTF-8, and a terminal may know ASCII alone: printing
    such a name would raise UnicodeEncodeError.

    Args:
        debug: leave tracebacks and warnings as Python prints them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if debug:
        yield
        return
    thread_hook, warn = threading.excepthook, warnings.showwarning
    seen: set[str] = set()

    def on_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is None or isinstance(failed.exc_value, SystemExit):
            return
        name = failed.thread.name if failed.thread else "a thread"
        what = f"{type(failed.exc_value).__name__}: {reason(failed.exc_value)}"
        print(f"warning: {name} failed: {what}. --debug shows where.", file=sys.stderr)

    def on_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = f"warning: {one_line(message)} ({category.__name__})"
        if text not in seen:  # a library may warn at every step
            seen.add(text)
            print(text, file=file or sys.stderr)

    threading.excepthook, warnings.showwarning = on_thread, on_warning
    try:
        yield
    finally:
        threading.excepthook, warnings.showwarning = thread_hook, warn
