"""One random damage to one file of a run: what disks, copies, editors and attackers leave."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Damage = Callable[[Random, Path, Path, Path], str]


def files_of(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file())


def corrupt(random: Random, run: Path, other: Path) -> tuple[Path, str]:
    """Damage a file of a run.

    Args:
        other: another run, on the same data.

    Returns: the file, relative to the run, and what was done.
    """
    folder = random.choice([run, run / "tokenizer", run / "checkpoints"])  # few files each, or many
    target = random.choice(files_of(folder))
    while True:
        damage = random.choice(DAMAGES)
        name = target.relative_to(run)
        if done := damage(random, target, other / name, run.parents[1] / "kept elsewhere"):
            return name, done


def _flip(random: Random, target: Path, *_: Path) -> str:
    data = bytearray(target.read_bytes())
    places = [random.randrange(len(data)) for _ in range(random.choice((1, 1, 3)))]
    for place in places:
        data[place] ^= 1 << random.randrange(8)
    target.write_bytes(data)
    return f"bits flipped at {places}"


def _cut(random: Random, target: Path, *_: Path) -> str:
    size = random.randrange(target.stat().st_size)
    os.truncate(target, size)
    return f"cut to {size} bytes"


def _zero(random: Random, target: Path, *_: Path) -> str:
    data = bytearray(target.read_bytes())
    begin = random.randrange(len(data))
    length = min(random.choice((1, 16, 4096)), len(data) - begin)
    data[begin : begin + length] = bytes(length)
    target.write_bytes(data)
    return f"{length} bytes zeroed at {begin}"


def _extend(random: Random, target: Path, *_: Path) -> str:
    tail = random.choice((b"\0", b"\n", b"}", b"\xff\xfe", bytes(5000), random.randbytes(100)))
    with target.open("ab") as file:
        file.write(tail)
    return f"followed by {len(tail)} bytes"


def _empty(random: Random, target: Path, *_: Path) -> str:
    target.write_bytes(b"")
    return "emptied"


def _delete(random: Random, target: Path, *_: Path) -> str:
    target.unlink()
    return "deleted"


def _replace(random: Random, target: Path, _: Path, elsewhere: Path) -> str:
    target.rename(elsewhere)
    kind = random.choice(("folder", "pipe", "link", "broken link", "loop", "endless link"))
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        names = {"link": elsewhere, "broken link": "nothing", "loop": target.name}
        target.symlink_to(names.get(kind, "/dev/zero"))
    return f"replaced by a {kind}"


def _swap(random: Random, target: Path, *_: Path) -> str:
    second = random.choice([path for path in target.parent.iterdir() if path.is_file()])
    if second == target:
        return ""
    data = target.read_bytes()
    target.write_bytes(second.read_bytes())
    second.write_bytes(data)
    return f"swapped with {second.name}"


def _of_another_run(random: Random, target: Path, same: Path, _: Path) -> str:
    if not same.exists() or same.read_bytes() == target.read_bytes():
        return ""
    shutil.copyfile(same, target)
    return "taken from another run"


def _edit_json(random: Random, target: Path, *_: Path) -> str:
    """A number, a text or an entry of a JSON file changed, as an editor would."""
    if target.suffix not in (".json", ".jsonl"):
        return ""
    text = target.read_text(encoding="utf-8")
    lines = text.splitlines() if target.suffix == ".jsonl" else [text]
    number = random.randrange(len(lines))
    value = json.loads(lines[number])
    holder, key = random.choice(list(_entries(value)))
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    what = random.choice(("change", "remove", "exchange", "type"))
    if what == "exchange":
        second = random.choice(list(keys))
        holder[key], holder[second] = holder[second], holder[key]
    elif what == "remove":
        del holder[key]
    elif what == "type":
        holder[key] = random.choice((None, True, "", "x", -1, 0.5, [], {}, 10**30))
    else:
        holder[key] = _changed(random, holder[key])
    lines[number] = json.dumps(value, ensure_ascii=False)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{what} at {key!r}"


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in inner:
        yield value, key
        if isinstance(entry, dict | list):
            yield from _entries(entry)


def _changed(random: Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, -value, value * 2, 0))
    return f"{value}x" if isinstance(value, str) else value


def _edit_toml(random: Random, target: Path, *_: Path) -> str:
    """A number of config.toml changed: the user's own right, so it is no damage but a setting."""
    if target.suffix != ".toml":
        return ""
    lines = target.read_text(encoding="utf-8").splitlines()
    numbers = [index for index, line in enumerate(lines) if re.search(r"= [\d.]+$", line)]
    index = random.choice(numbers)
    key, _, value = lines[index].partition(" = ")
    new = random.choice(("-1", "0", "1", "3", "0.5", "1e30", "nan", '"x"', "true", "[]", value))
    lines[index] = f"{key} = {new}"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{key} set to {new}"


DAMAGES: tuple[Damage, ...] = (
    *(_flip, _flip, _flip, _cut, _zero, _extend, _empty, _delete, _replace, _swap),
    *(_of_another_run, _edit_json, _edit_json, _edit_toml),
)
