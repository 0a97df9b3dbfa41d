"""The command line: one file a command. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack
from typing import Any

from picotron_core.cli.output import flush_or_drop, lasting, open_missing
from picotron_core.cli.stop import INTERRUPTED, Stopped, raising_signals
from picotron_core.cli.streams import printable_streams
from picotron_core.errors import ConfigError, PicotronError, is_out_of_memory, one_line, reason

__all__ = ["INTERRUPTED", "main"]

LONGEST = 4000  # characters of an error's line: a setting's value may be a whole file


def main() -> None:
    """Run a command; print an error as one line, with its traceback only under --debug."""
    words = sys.argv[1:]
    debug = "--debug" in words
    try:
        with ExitStack() as stack:
            stack.enter_context(raising_signals())
            open_missing()
            stack.enter_context(lasting("stderr"))  # what it does not take decides no exit code
            if words[:1] == ["train"]:
                stack.enter_context(lasting("stdout"))
            stack.enter_context(printable_streams(debug=debug))
            code = _run([word for word in words if word != "--debug"], debug=debug)
    except (KeyboardInterrupt, Stopped) as stopped:  # while the lines above began or ended
        code = _say_stopped(stopped)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """Run a command; returns the exit code."""
    try:
        import typer

        from picotron_core.cli.app import app
    except Stopped as stopped:
        return _say_stopped(stopped)
    # click's UsageError, by the one name that typer gives to it: newer typers carry a copy of click
    usage_error: Any = typer.BadParameter.__base__
    try:
        _refuse_nul(arguments)
        code = int(app(arguments, prog_name="picotron", standalone_mode=False) or 0)
    except BrokenPipeError:  # whoever read our output has seen enough, as in `| head`
        code = PicotronError.exit_code
    except usage_error as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort, Stopped) as stopped:
        code = _say_stopped(stopped)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the last net: panics of Rust are no Exception
        if debug:
            traceback.print_exc()
        print(f"error: {_sentence(error, arguments)}", file=sys.stderr)
        code = getattr(error, "exit_code", PicotronError.exit_code)
    if why := flush_or_drop():
        if not isinstance(why, BrokenPipeError):
            print(f"error: Cannot write to standard output: {reason(why)}.", file=sys.stderr)
        code = code or PicotronError.exit_code
    return code


def _say_stopped(stopped: BaseException) -> int:
    code = getattr(stopped, "exit_code", INTERRUPTED)
    print("Interrupted." if code == INTERRUPTED else f"{stopped}.", file=sys.stderr)
    return int(code)


def _refuse_nul(arguments: list[str]) -> None:
    for argument in arguments:
        if "\0" in argument:
            raise ConfigError(f"{one_line(argument)!r} has a NUL character: leave it out.")


def _sentence(error: BaseException, arguments: list[str]) -> str:
    """What is printed of an error; one that is not ours is said to be a bug."""
    if isinstance(error, PicotronError):
        return one_line(" ".join([str(error), *getattr(error, "__notes__", ())]), longest=LONGEST)
    if is_out_of_memory(error):
        return (
            "Out of memory. Close other programs, or use a smaller model, --train.micro_batch or "
            "--data.seq_len."
        )
    if isinstance(error, OSError):
        return f"{reason(error)}. --debug shows where it was met."
    words = [word for word in arguments[:1] if not word.startswith("-")]
    command = one_line(" ".join(["picotron", *words]), longest=100)
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    return (
        f"{type(error).__name__}: {reason(error)}.{notes} `{command}` did not expect this: it is a "
        "bug. Please report it, with what the same command prints under --debug."
    )
