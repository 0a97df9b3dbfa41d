"""The command line: one file a command. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from picotron_core.cli.streams import printable_streams
from picotron_core.errors import ConfigError, PicotronError, is_out_of_memory, one_line, reason

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
LONGEST = 4000  # characters of an error's line: a setting's value may be a whole file


def main() -> None:
    """Run a command; print an error as one line, with its traceback only under --debug."""
    import typer

    from picotron_core.cli.app import app

    # click's UsageError, by the one name that typer gives to it: newer typers carry a copy of click
    usage_error: Any = typer.BadParameter.__base__
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with printable_streams(debug=debug):
        try:
            _refuse_nul(arguments)
            code = app(arguments, prog_name="picotron", standalone_mode=False) or 0
        except BrokenPipeError:  # whoever read our output has seen enough, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except usage_error as error:
            error.show()
            code = error.exit_code
        except (KeyboardInterrupt, typer.Abort):
            print("Interrupted.", file=sys.stderr)
            code = INTERRUPTED
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - the last net: panics of Rust are no Exception
            if debug:
                traceback.print_exc()
            print(f"error: {_sentence(error, arguments)}", file=sys.stderr)
            code = getattr(error, "exit_code", PicotronError.exit_code)
    sys.exit(code)


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
    return (
        f"{type(error).__name__}: {reason(error)}. `{command}` did not expect this: it is a bug. "
        "Please report it, with what the same command prints under --debug."
    )
