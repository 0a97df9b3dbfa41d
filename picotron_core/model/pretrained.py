"""Weights in Hugging Face's layout: config.json and safetensors, from a folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picotron_core.errors import ConfigError
from picotron_core.model.architecture import Architecture
from picotron_core.model.llama import Llama

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names


def load_architecture(path_or_name: str | Path) -> Architecture:
    """The architecture of a folder's config.json, or of a hub repository's.

    Raises: ConfigError when there is none, or when it is not a Llama that Picotron computes.
    """
    folder = _folder(path_or_name, ["config.json"])
    return Architecture.from_transformers(_read_json(folder / "config.json"))


def load_weights(model: Llama, path_or_name: str | Path) -> None:
    """Fill the model's parameters from model.safetensors, or from the shards of its index.

    Values are converted to each parameter's dtype (a 16-bit checkpoint is upcast to float32) and
    device. A tied head may be absent from the file. Rotary frequencies in old checkpoints are not
    read: the architecture gives them.

    Raises: ConfigError that names the tensors that are missing, unexpected, of another shape or of
        no float dtype, or a tied head that differs from the embedding. All but the last are found
        before a parameter is changed.
    """
    from safetensors import SafetensorError, safe_open

    folder = _folder(path_or_name, ["*.safetensors", "*.json"])
    files = _tensor_files(folder)
    parameters = dict(model.named_parameters())
    names = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    tied = model.architecture.tie_word_embeddings
    may_have = parameters.keys() | ({_HEAD} if tied else set())
    _refuse_any("lack", parameters.keys() - names, folder)
    _refuse_any("have, but the model does not,", names - may_have, folder)
    try:
        shards: dict[str, Any] = {
            file: safe_open(folder / file, framework="pt", device="cpu")
            for file in sorted(set(files.values()))
        }
        read = {name: shards[files[name]] for name in sorted(names)}
        for name, shard in read.items():
            wanted = parameters[_EMBEDDING if tied and name == _HEAD else name].shape
            _check_tensor(name, shard.get_slice(name), wanted, folder)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(read[name].get_tensor(name))
        if tied and _HEAD in read:
            head, embedding = (read[name].get_tensor(name) for name in (_HEAD, _EMBEDDING))
            _check_tied_head(head, embedding, folder)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"The weights in {folder} cannot be read: {_one_line(error)}") from error


def _folder(path_or_name: str | Path, patterns: list[str]) -> Path:
    """The local folder, or a snapshot of the hub repository (only files that match `patterns`)."""
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"No model folder {name!r}: give one with config.json and model.safetensors, or the "
            "name of a Hugging Face repository."
        )
    from huggingface_hub import errors, snapshot_download

    # The base of the hub's transport errors, from whichever HTTP library its version uses.
    transport_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (errors.HFValidationError, transport_error, OSError) as error:
        raise ConfigError(
            f"{name!r} is neither a folder here nor a repository that the Hugging Face hub gave: "
            f"{_one_line(error)}"
        ) from error


def _tensor_files(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        for file in set(weight_map.values()):
            if Path(file).name != file or not (folder / file).is_file():
                raise ConfigError(f"{index} names {file!r}, which is not a file beside it.")
        return dict(weight_map)
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json: save the "
            "model as safetensors (other formats can run code when they are read)."
        )
    try:
        with safe_open(single, framework="pt", device="cpu") as shard:
            return dict.fromkeys(shard.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{single} cannot be read: {_one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return content


def _refuse_any(what: str, names: Iterable[str], folder: Path) -> None:
    found = sorted(names)
    if found:
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ConfigError(
            f"The weights in {folder} {what} {shown}: config.json and the weights do not belong "
            "together."
        )


def _check_tensor(name: str, stored: Any, wanted: torch.Size, folder: Path) -> None:
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != tuple(wanted):
        raise ConfigError(f"{name} in {folder} is {shape}, but the model's is {tuple(wanted)}.")
    if dtype not in _FLOATS:
        raise ConfigError(f"{name} in {folder} is {dtype}; Picotron reads {', '.join(_FLOATS)}.")


def _check_tied_head(head: Tensor, embedding: Tensor, folder: Path) -> None:
    if not torch.equal(head, embedding):
        raise ConfigError(
            f"{folder} has tie_word_embeddings, but its {_HEAD} differs from {_EMBEDDING}: set "
            "tie_word_embeddings to false in its config.json."
        )


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
