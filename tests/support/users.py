"""Code that runs as other users, which only root can ask for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ALICE, BOB = 54_001, 54_002  # no accounts need to exist
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)
# Code imports what it needs before it becomes another user: the interpreter's own files may be
# readable by root alone.
PRELUDE = """
import faulthandler, importlib, os, sys, traceback
from contextlib import suppress
from pathlib import Path

def as_user(uid, work, *, umask=0o022):
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    faulthandler.dump_traceback_later(240, exit=True)
    try:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        os.umask(umask)
        print("DONE", work())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        if os.environ.get("SHOW"):
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)

def import_what_is_needed_for(work, note):
    # Do it once in a child, as root, and import here what it imported there.
    as_user(0, lambda: (work(), note.write_text(" ".join(sys.modules))))
    for name in note.read_text().split():
        with suppress(Exception):
            importlib.import_module(name)
"""


def run(code: str, *arguments: object, errors_too: bool = False) -> list[str]:
    """Run code that calls `as_user(uid, work)`; the lines that it prints: DONE and what `work`
    returned, or the name of an exception and its message.
    """
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors_too else None,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # its threads outlive no fork
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="picotron-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
