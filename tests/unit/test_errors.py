"""What the command line makes of errors that are not Picotron's own."""

from __future__ import annotations

import io
import sys
import threading
import warnings
import zipfile
import zlib

import pytest
import torch
from safetensors import SafetensorError

from picotron_core import cli
from picotron_core.errors import LONGEST, one_line, reason


def test_a_message_is_whole_and_one_line():
    error = RuntimeError("The header is wrong.\n  It was\tcut.\n\n  Fetch it anew.\n")
    assert reason(error) == "The header is wrong. It was cut. Fetch it anew"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(36, "File name too long", "x"), "File name too long: 'x'"),
        (OSError("no strerror"), "no strerror"),
        (ValueError(), "ValueError"),
        (KeyError("weights"), "KeyError: 'weights'"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (
            SafetensorError("Error while deserializing header\nx"),
            "Error while deserializing header x",
        ),
    ],
)
def test_a_foreign_error_says_what_it_says(error, said):
    assert reason(error) == said


def test_what_a_terminal_cannot_show_is_escaped_and_a_flood_is_cut_between_words():
    assert one_line("caf\udce9 \x1b[31m\x07 déjà") == r"caf\udce9 \x1b[31m\x07 déjà"
    long = one_line("word " * 10_000)
    assert len(long) <= LONGEST + 4
    assert long.endswith("word ...")


def a_panic() -> BaseException:
    """What Rust's panics become in Python: no Exception."""
    return type("PanicException", (BaseException,), {})("index out of bounds")


def undecodable() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


UNEXPECTED = [
    RuntimeError("The size of tensor a (3)\nmust match the size of tensor b (4)"),
    OverflowError("Python int too large to convert to C long"),
    RecursionError("maximum recursion depth exceeded"),
    undecodable(),
    UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
    zlib.error("Error -3 while decompressing data: invalid block type"),
    zipfile.BadZipFile("File is not a zip file"),
    SafetensorError("Error while deserializing header: invalid JSON"),
    KeyError("weight_map"),
    AssertionError(),
    ZeroDivisionError("division by zero"),
    ExceptionGroup("several\nof them", [ValueError("a")]),
    a_panic(),
]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_what_nobody_expected_is_one_line_that_asks_for_a_report(picotron, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("picotron_core.cli.config.list_settings", fail)
    code, out, err = picotron("config")
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith(f"error: {type(error).__name__}: ")
    assert "`picotron config`" in err
    assert "it is a bug" in err
    assert "--debug" in err
    assert "Traceback" not in out + err
    assert "Traceback" in picotron("config", "--debug")[2]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_ran_out_is_no_bug(picotron, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("picotron_core.cli.config.list_settings", fail)
    code, _, err = picotron("config")
    assert code == 1
    assert err.startswith("error: Out of memory. ")
    assert "bug" not in err


def test_a_thread_that_fails_and_a_library_that_warns_are_one_line_each(picotron, monkeypatch):
    def noisy(*_: object, **__: object) -> None:
        def fail() -> None:
            raise ValueError("in a\nthread")

        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for _ in range(3):
                warnings.warn("this is slow\n  and will go", UserWarning, stacklevel=1)

    monkeypatch.setattr("picotron_core.cli.config.list_settings", noisy)
    code, _, err = picotron("config")
    assert code == 0
    assert err.splitlines() == [
        "warning: writer failed: ValueError: in a thread. --debug shows where.",
        "warning: this is slow and will go (UserWarning)",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_every_name_can_be_printed(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["picotron", "train", "--resume", "runs/caf\udce9 \u65e5"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    streams[1].flush()
    said = streams[1].buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert "runs/caf\\udce9 " in said
    assert said.count("\n") == 1


def test_a_nul_in_an_argument_is_refused(picotron):
    code, _, err = picotron("train", "--resume", "runs/a\0b")
    assert (code, err.count("\n")) == (2, 1)
    assert "NUL" in err
