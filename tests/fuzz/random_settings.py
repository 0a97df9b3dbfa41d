"""Settings drawn from the schema: bounds and their neighbours, extremes, other types, odd texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from picotron_core.config import ENVIRONMENT
from picotron_core.schema import fields

TEXTS = (
    *("", " ", "0", "-1", "1e3", "nan", "true", "auto", "none", "a b", "a;b=c", "--help", "-", "."),
    *("..", "../x", "a/b/c", "missing/deep", "~", "~nobody/x", "$HOME", "%s%n", "{x}", "\\", "'\""),
    *(
        "\n",
        "\t",
        "\r\n",
        "\x1b[31m",
        "é中文",
        "💥",
        "\u202e",
        "\ufeff",
        "\ud800",
        "\udcff",
        "a" * 300,
    ),
    *("a" * 5000, "x/" * 500, "/dev/null", "/dev/zero", "/dev/null/x", "/proc/self/mem", "cpu"),
    *("cuda", "t4", "gpt2", "naive-math", "sdpa", "*", "norm=naive-math", "attention=x,y"),
    *("loss=mem_efficient;*=auto", "config.toml", "1:00", "1-", "99999999999", "00:00:01"),
)
INTEGERS = (-(10**30), -(2**63), -1, 0, 1, 2, 3, 7, 8, 64, 1000, 2**15, 2**31, 2**32, 2**63, 10**30)
FLOATS = (
    *(-math.inf, -1e300, -1.0, -1e-300, -0.0, 0.0, 5e-324, 1e-300, 1e-45, 1e-8, 0.1, 0.5, 1.0),
    *(1.5, 3e38, 4e38, 1e300, math.inf, math.nan),
)
OTHER_TYPES: tuple[Any, ...] = (True, False, "text", "", "1", 1, 1.5, [], [1], ["a"], {}, {"a": 1})
KNOWN = [(key, setting) for key, setting in fields() if "." in key]


@dataclass(slots=True)
class Case:
    """What a run is asked by: a file's content, flags, and variables."""

    values: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)


def draw_case(random: Random, base: dict[str, dict[str, Any]]) -> Case:
    """A base that trains, with one to four settings at random."""
    case = Case(values={section: dict(values) for section, values in base.items()})
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        key, setting = random.choice(KNOWN)
        if random.random() < 0.1:
            name = random.choice(sorted(ENVIRONMENT))
            case.env[name] = _argument(random.choice(TEXTS))
            continue
        value = draw_value(random, setting)
        if random.random() < 0.5:
            case.flags += [f"--{key}", _argument(value)]
        else:
            table = case.values
            *sections, last = key.split(".")
            for section in sections:
                inner = table.setdefault(section, {})
                table = inner if isinstance(inner, dict) else table
            table[last] = value
    return case


def draw_value(random: Random, setting: FieldInfo) -> Any:
    """A value for a setting, right or wrong."""
    if random.random() < 0.15:
        return random.choice(OTHER_TYPES)
    kinds = list(_kinds(setting.annotation))
    kind = random.choice(kinds)
    bounds = [
        getattr(constraint, name)
        for constraint in _constraints(setting.annotation, setting.metadata)
        for name in ("ge", "gt", "le", "lt")
        if getattr(constraint, name, None) is not None
    ]
    drawing: dict[Any, Callable[[], Any]] = {
        bool: lambda: random.random() < 0.5,
        int: lambda: _integer(random, bounds, setting.default),
        float: lambda: _float(random, bounds, setting.default),
        str: lambda: random.choice(TEXTS),
        list: lambda: random.choices(TEXTS, k=random.choice((0, 1, 3))),
    }
    return drawing[kind]() if kind in drawing else kind  # one of a Literal's values


def _integer(random: Random, bounds: list[Any], default: Any) -> int:
    if bounds and random.random() < 0.5:
        return int(random.choice(bounds)) + random.choice((-1, 0, 1))
    if isinstance(default, int) and random.random() < 0.4:
        return max(default + random.choice((-1, 1)), 0) * random.choice((1, 2))
    return random.choice(INTEGERS)


def _float(random: Random, bounds: list[Any], default: Any) -> float:
    if bounds and random.random() < 0.5:
        bound = float(random.choice(bounds))
        return random.choice((math.nextafter(bound, -math.inf), bound, math.nextafter(bound, 9e99)))
    if isinstance(default, float) and random.random() < 0.3:
        return default * random.choice((-1, 0.5, 2, 1e3, 1e-3))
    return random.choice(FLOATS)


def _kinds(annotation: Any) -> list[Any]:
    """int, float, str, bool, list, and the values of a Literal."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for inner in get_args(annotation) for kind in _kinds(inner)]
    if origin is Literal:
        return list(get_args(annotation))
    if origin is not None:
        return [origin]
    return [str] if annotation is NoneType or annotation is None else [_plain(annotation)]


def _plain(annotation: Any) -> Any:
    return annotation if annotation in (bool, int, float, str) else str  # a table: no text is one


def _constraints(annotation: Any, metadata: list[Any]) -> list[Any]:
    found = list(metadata)
    if get_origin(annotation) is Annotated:
        first, *inner = get_args(annotation)
        for constraint in inner:
            found += getattr(constraint, "metadata", [constraint])
        return _constraints(first, found)
    for inner in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ():
        found += _constraints(inner, [])
    return found


def _argument(value: Any) -> str:
    """As one types it: a command line knows no other type, and has no lone surrogates but those of
    bytes that are not UTF-8.
    """
    text = value if isinstance(value, str) else str(value).lower()
    return text.replace("\ud800", "\udcfe")
