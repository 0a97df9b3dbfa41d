"""`picotron config`: every setting, its value, and what it means."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from picotron_core.config import ENVIRONMENT, Config, Settings, fields

PIPE_WIDTH = 200  # columns where no terminal says how many there are: one line a setting


def list_settings(settings: Settings, *, markdown: bool) -> None:
    if markdown:
        print(as_markdown())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "meaning", box=None, header_style="bold")
    for key, field in fields():
        value = _value(settings.config, key)
        style = "" if value == _default(field) else "bold yellow"
        table.add_row(key, f"[{style}]{value!r}[/]" if style else repr(value), field.description)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(table)


def as_markdown() -> str:
    """The tables of docs/configuration.md."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for key, field in fields():
        default = _default(field)
        shown = "none" if default is None else f"`{default!r}`"
        lines.append(f"| `{key}` | {shown} | {field.description} |")
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
