"""`picotron examples`: the configs that come with the package."""

from __future__ import annotations

from pathlib import Path

import picotron_core
from picotron_core.errors import ConfigError, RunError, did_you_mean
from picotron_core.files import create, write_all

PACKAGE = Path(picotron_core.__file__).parent


def list_examples() -> None:
    """Print the name of each example and what it is for."""
    for name, path in _examples().items():
        print(f"{name:15} {_first_comment(path)}")
    print("\nWrite one here, and train by it: picotron examples NAME; picotron train NAME.toml")


def write_example(name: str) -> None:
    """Write an example into the current folder.

    Raises: ConfigError for another name, and where the file exists; RunError where it cannot be
        written.
    """
    examples = _examples()
    name = name.removesuffix(".toml")
    if name not in examples:
        raise ConfigError(f"No example {name!r}. {did_you_mean(name, examples)}")
    target = Path(f"{name}.toml")
    try:
        with create(target) as file:
            write_all(file, examples[name].read_bytes())
    except FileExistsError:
        raise ConfigError(f"{target} exists and is not overwritten. Move it away.") from None
    except OSError as error:
        raise RunError(
            f"Cannot write {target}: {error.strerror}. Go to a folder that you can write to."
        ) from None
    print(f"Wrote {target}. Train by it: picotron train {target}")


def _examples() -> dict[str, Path]:
    """The bundled configs by name."""
    installed = PACKAGE / "examples"  # a wheel has them there; a checkout beside the package
    folder = installed if installed.is_dir() else PACKAGE.parent / "examples"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
