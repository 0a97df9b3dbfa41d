"""Every error a user can meet: one line that says what was wanted, what was found, what to do.

The command line prints the message alone and exits with `exit_code`; `--debug` adds the traceback.
Errors of libraries and of the system become part of such a line by `reason`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1000  # characters of a foreign message: libraries quote whole files
LONGEST_VALUE = 80


class PicotronError(Exception):
    """Something a user can mend. `exit_code`: 1 = the run failed, 2 = it was asked wrongly."""

    exit_code = 1


class ConfigError(PicotronError, ValueError):
    """A setting, flag, variable or path that cannot be what was meant."""

    exit_code = 2


class BackendError(ConfigError):
    """No backend can serve what was asked, or two claim the same name."""


class DataError(ConfigError):
    """The text that was asked for is missing, empty, or too short to train on."""


class DamagedFileError(PicotronError):
    """A file that Picotron wrote does not hold what it should."""


class RunError(PicotronError):
    """A run that had started cannot go on."""


class LostRankError(RunError):
    """Another rank is gone, and this one can but say so."""


class NotSavedError(RunError):
    """The disk refuses a checkpoint. Earlier ones are untouched."""


class NotFiniteError(RunError):
    """A loss or gradient is infinite or NaN. The update was not made: the state is whole."""


def reason(error: BaseException) -> str:
    """What an error of a library or of the system says, as part of a sentence: its whole message in
    one line, without a final full stop; its type where it has no message.

    >>> reason(FileNotFoundError(2, "No such file or directory", "a.txt"))
    "No such file or directory: 'a.txt'"
    >>> reason(ValueError("Header too large.\\n  Is it a model?\\n"))
    'Header too large. Is it a model?'
    """
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename!r}" if error.filename is not None else ""
        return one_line(f"{error.strerror}{where}")
    if isinstance(error, KeyError):
        return one_line(f"KeyError: {error}")
    return one_line(error).rstrip(". ") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's MemoryError, or what torch raises on any device."""
    if isinstance(error, MemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def one_line(text: object, *, longest: int = LONGEST) -> str:
    r"""Text in one line that any terminal can show: white space is one space, and characters that
    cannot be printed are written as escapes.

    Args:
        longest: characters that are kept; a longer text is cut between two words.

    >>> one_line("not\n  \x1b[1mvalid")
    'not \\x1b[1mvalid'
    """
    words = " ".join(str(text)[: 4 * longest].split())
    shown = "".join(c if c.isprintable() else _escaped(c) for c in words)
    if len(shown) <= longest:
        return shown
    cut = shown[:longest]
    return f"{cut.rpartition(' ')[0] or cut} ..."


def quoted(value: object) -> str:
    """A value as an error shows it, however long it is.

    >>> quoted("a\\n"), len(quoted([0] * 1000))
    ("'a\\\\n'", 83)
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4300 digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The nearest right word as a sentence, or all of them where none is near.

    >>> did_you_mean("atention", ["attention", "norm"])
    "Did you mean 'attention'?"
    >>> did_you_mean("xyz", ["attention", "norm"])
    'Choose from: attention, norm.'
    """
    known = sorted(set(options))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Choose from: {', '.join(known)}."
