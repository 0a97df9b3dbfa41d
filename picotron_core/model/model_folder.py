"""A folder of Hugging Face's layout: where it is, what is in it, and what it is if it is no model.

Nothing in it is trusted: it may have been downloaded.
"""

from __future__ import annotations

import json
from io import BufferedReader
from pathlib import Path
from typing import Any

from picotron_core.errors import ConfigError, reason
from picotron_core.files import open_regular

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST = 1 << 26  # bytes of a JSON file: the index of the largest model is a hundredth of it

PICKLED = "which can run code when they are read, so Picotron reads safetensors alone"

# What a folder without the files of a model may be instead: a pattern, and what to do with it.
OTHERS = {
    "adapter_config.json": "an adapter (LoRA), not a model. Merge it into its base with peft's "
    "merge_and_unload(), and save the result with save_pretrained().",
    "*.gguf": "GGUF files, whose weights are quantised for inference. Name the repository that "
    f"they were made from, with {WEIGHTS}.",
    "*.bin": f"pickled weights (.bin), {PICKLED}: where you trust them, convert them with "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER).",
    "*.pt": f"pickled weights (.pt), {PICKLED}: convert the model to Hugging Face's layout.",
    "*.pth": f"pickled weights (.pth), {PICKLED}: convert the model to Hugging Face's layout.",
    "*.h5": "TensorFlow's weights (.h5): convert them to safetensors with transformers.",
    "*.msgpack": "Flax's weights (.msgpack): convert them to safetensors with transformers.",
    "checkpoints": "a run of Picotron. Export it first: picotron export RUN NEW_FOLDER.",
}


def find_folder(path_or_name: str | Path, patterns: list[str]) -> Path:
    """The local folder, or a snapshot of the hub repository with the files that match `patterns`.

    Raises: ConfigError where there is neither.
    """
    path, name = Path(path_or_name).expanduser(), str(path_or_name)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long a name, a NUL, a folder that is not ours
        raise ConfigError(f"The model {name!r} cannot be looked at: {reason(error)}.") from None
    if exists:
        what = "a GGUF file, quantised for inference" if path.suffix == ".gguf" else "a file"
        raise ConfigError(
            f"The model {name!r} is {what}: give the folder with config.json and {WEIGHTS}."
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"No model folder {name!r}: give one with config.json and {WEIGHTS}, or the name of a "
            "Hugging Face repository."
        )
    from huggingface_hub import errors, snapshot_download

    # The base of the hub's transport errors, from whichever HTTP library its version uses.
    transport_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (errors.HFValidationError, transport_error, OSError, ValueError) as error:
        raise ConfigError(
            f"{name!r} is neither a folder here nor a repository that the Hugging Face hub gave: "
            f"{reason(error)}. Check the name; without a network, give a folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a byte-order mark is left out.

    Raises: ConfigError that names the file.
    """
    try:
        # Snapshots of the hub are links to its cache.
        with BufferedReader(open_regular(path.resolve(strict=True))) as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(_lacks(path)) from None
    except (OSError, ValueError, RecursionError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"{path} holds no JSON object, but a {kind}. Fetch the file anew.")
    return content


def tensor_files(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor.

    Raises: ConfigError that names the file.
    """
    from safetensors import SafetensorError, safe_open

    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} has no weight_map that names files. Fetch it anew.")
        for file in dict.fromkeys(map(str, weight_map.values())):
            if Path(file).name != file or not _is_file(folder / file):
                raise ConfigError(
                    f"{index} names {file!r}, which is not a file beside it. Fetch the file."
                )
        return {str(name): str(file) for name, file in weight_map.items()}
    if not single.is_file():
        raise ConfigError(_lacks(single))
    try:
        with safe_open(single, framework="pt", device="cpu") as shard:
            return dict.fromkeys(shard.keys(), single.name)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            f"{single} cannot be read: {reason(error)}. Fetch the file anew."
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def _lacks(path: Path) -> str:
    """Why a folder without this file is no model, and what it is instead."""
    folder = path.parent
    for pattern, what in OTHERS.items():
        if any(folder.glob(pattern)):
            return f"{folder} holds no {path.name}: it has {what}"
    if path.name == WEIGHTS:
        return (
            f"{folder} holds neither {WEIGHTS} nor {INDEX}: fetch them, or save the model with "
            "save_pretrained()."
        )
    return f"{folder} holds no {path.name}: give the folder of a Hugging Face model."
