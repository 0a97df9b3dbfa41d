"""What the value of a setting may be: checks that pydantic has no constraint for, and all in words.

Bounds are wide enough for any run that makes sense, and narrow enough that no value overflows,
rounds to nothing, or asks for what no machine has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

STEPS = 10**9  # at a millisecond each, eleven days
LONGEST_TEXT = 100_000  # characters
LONGEST_PATH = 4096  # bytes, Linux's limit
LONGEST_NAME = 200  # bytes of a run's name: file systems take 255, of which some are kept for -2
DAYS = 366  # the longest time limit


def zero_or_from(low: float) -> AfterValidator:
    """A number that is 0, which turns something off, or at least `low`."""
    return AfterValidator(partial(_zero_or_from, low=low))


def _zero_or_from(value: float, *, low: float) -> float:
    if value and value < low:
        raise ValueError(f"must be 0 or at least {low:g}.")
    return value


def _text(value: str) -> str:
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"has {len(value)} characters, more than {LONGEST_TEXT}.")
    if "\0" in value:
        raise ValueError("has a NUL character: leave it out.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text: convert it, or leave it out.") from None
    return value


def _path(value: str) -> str:
    """The name of a file or folder may have bytes that are not UTF-8: they are kept."""
    if "\0" in value:
        raise ValueError("has a NUL character, which no path can have.")
    try:
        size = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise ValueError("has characters that no path can have.") from None
    if size > LONGEST_PATH:
        raise ValueError(f"has {size} bytes, more than a path's {LONGEST_PATH}.")
    return value


def _folder(value: str) -> str:
    if not value.strip():
        raise ValueError("must name a folder; '.' is the one you are in.")
    return _path(value)


def is_plain_name(name: str) -> bool:
    """Whether a folder of this name lies in its parent, and can be shown in one line."""
    shown = name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return Path(name).name == name and name != ".." and shown.isprintable()


def _run_name(value: str) -> str:
    if value and not is_plain_name(value):
        raise ValueError("must be a plain folder name; run.dir is its parent.")
    if len(value.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        raise ValueError(f"has more than {LONGEST_NAME} bytes: shorten it.")
    return _path(value)


def seconds_of(time_limit: str) -> float:
    """A time as Slurm's --time has it: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes, days-hours:minutes:seconds. "" and 0 are no limit: 0.

    Raises: ValueError.

    >>> seconds_of("90"), seconds_of("1:30:00"), seconds_of("1-12")
    (5400.0, 5400.0, 129600.0)
    """
    if not time_limit:
        return 0.0
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time_limit, re.ASCII):
        raise ValueError(
            "is no time. Write minutes, hours:minutes:seconds or days-hours, as for Slurm's --time."
        )
    days, dash, rest = time_limit.rpartition("-")
    parts = rest.split(":")
    if max(map(len, [days, *parts])) > 9:
        raise ValueError(f"is more than {DAYS} days.")
    numbers = [int(number) for number in parts]
    if dash or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    found = 86400.0 * int(days or 0) + 3600.0 * hours + 60.0 * minutes + seconds
    if found > 86400 * DAYS:
        raise ValueError(f"is more than {DAYS} days.")
    return found


def _time_limit(value: str) -> str:
    seconds_of(value)
    return value


Text = Annotated[str, AfterValidator(_text)]
PathText = Annotated[str, AfterValidator(_path)]  # of a file, a folder, or a name on the hub
FolderText = Annotated[str, AfterValidator(_folder)]
RunName = Annotated[str, AfterValidator(_run_name)]
TimeLimit = Annotated[str, AfterValidator(_time_limit)]


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words: "a whole number from 1 to 65536"."""
    return _allowed(field.annotation, field.metadata)


def _allowed(kind: Any, constraints: list[Any]) -> str:
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _allowed(inner, [c for m in more for c in getattr(m, "metadata", [m])])
    if get_origin(kind) in (Union, UnionType):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        return " or ".join(_allowed(part, []) for part in kinds)
    if get_origin(kind) is Literal:
        return " or ".join(repr(word) for word in get_args(kind))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return _numbers("a whole number" if kind is int else "a number", constraints)
    if get_origin(kind) is list:
        return "a list of texts"
    if get_origin(kind) is dict:
        return "a table of op = name, or of op = a list of names"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a table"
    return "text"


_LIMITS: dict[type, Callable[[Any], str]] = {
    annotated_types.Ge: lambda c: f"from {_number(c.ge)}",
    annotated_types.Gt: lambda c: f"above {_number(c.gt)}",
    annotated_types.Le: lambda c: f"to {_number(c.le)}",
    annotated_types.Lt: lambda c: f"below {_number(c.lt)}",
}


def _numbers(what: str, constraints: list[Any]) -> str:
    limits = [_LIMITS[type(c)](c) for c in constraints if type(c) in _LIMITS]
    found = " ".join([what, *limits])
    for constraint in constraints:
        if isinstance(constraint, AfterValidator) and isinstance(constraint.func, partial):
            low = _number(constraint.func.keywords["low"])
            return f"0, or {found.replace('from 0', f'from {low}')}"
    return found


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"
