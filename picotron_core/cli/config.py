"""`picotron config`: every setting, its value, and what it means."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from picotron_core.bounds import allowed
from picotron_core.config import ENVIRONMENT, Settings
from picotron_core.schema import Config, fields

PIPE_WIDTH = 200  # columns where no terminal says how many there are: one line a setting


def list_settings(settings: Settings, *, markdown: bool) -> None:
    if markdown:
        print(as_markdown())
        return
    from rich.table import Table
    from rich.text import Text

    from picotron_core.cli.terminal import open_console

    table = Table("setting", "value", "meaning", box=None, header_style="bold")
    for key, field in fields():
        value = _value(settings.config, key)
        if key != "backends":
            style = "" if value == _default(field) else "bold yellow"
            table.add_row(key, Text(repr(value), style=style), field.description)
    for rule in settings.rules:
        wish = f"{rule.op or 'every op it has'} = {', '.join(rule.names)}  ({rule.source})"
        table.add_row("backends", Text(wish, style="bold yellow"), "")
    open_console(width=PIPE_WIDTH).print(table)


def as_markdown() -> str:
    """The tables of docs/configuration.md."""
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for key, field in fields():
        default = _default(field)
        shown = "none" if default is None else f"`{default!r}`"
        lines.append(f"| `{key}` | {shown} | {allowed(field)} | {field.description} |")
    lines += ["", "| variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    return "\n".join(lines)


def _default(field: Any) -> object:
    if field.default is not PydanticUndefined:
        return field.default
    return field.default_factory()


def _value(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
