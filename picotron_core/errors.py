"""Every error a user can meet: one line that says what was wanted, what was found, what to do.

The command line prints the message alone and exits with `exit_code`; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
