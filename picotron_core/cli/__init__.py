"""The command line: one file a command. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from picotron_core.errors import PicotronError

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


def main() -> None:
    """Run a command; print an error as one line, with its traceback only under --debug."""
    import typer

    from picotron_core.cli.app import app

    # click's UsageError, by the one name that typer gives to it: newer typers carry a copy of click
    usage_error: Any = typer.BadParameter.__base__
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, prog_name="picotron", standalone_mode=False) or 0
    except PicotronError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # whoever read our output has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}. --debug shows where it was met.", file=sys.stderr)
        code = PicotronError.exit_code
    except usage_error as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("Interrupted.", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)
