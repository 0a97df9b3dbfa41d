"""Weights in Hugging Face's layout: config.json and safetensors, from a folder or the hub."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picotron_core.errors import ConfigError, quoted, reason
from picotron_core.model.architecture import Architecture
from picotron_core.model.init import Values, fill
from picotron_core.model.llama import Llama
from picotron_core.model.model_folder import find_folder, read_json, tensor_files
from picotron_core.precision import DTYPES

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
GENERATION = "generation_config.json"
LLAMA_EOS = 2  # that of transformers' LlamaConfig, where no file says another
_ROWS = 4096  # of the vocabulary, read at once
_FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names


def load_architecture(path_or_name: str | Path) -> Architecture:
    """The architecture of a folder's config.json, or of a hub repository's.

    Raises: ConfigError when there is none, or when it is not a Llama that Picotron computes.
    """
    path = find_folder(path_or_name, ["config.json"]) / "config.json"
    described = read_json(path)
    code = described.get("auto_map")
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        if isinstance(code, dict) and name in code:
            raise ConfigError(
                f"{path} says that the model is computed by code of its own ({code[name]}, in "
                "auto_map), and Picotron runs no code from model folders. If it is a plain Llama, "
                "remove auto_map from that file."
            )
    try:
        return Architecture.from_transformers(described)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_end_tokens(path_or_name: str | Path) -> tuple[int, ...]:
    """The ids that end a text, by config.json and generation_config.json: all of both. -1 is none.

    Raises: ConfigError that names the file, where they are no ids.
    """
    folder = find_folder(path_or_name, ["config.json", GENERATION])
    configs = {folder / "config.json": read_json(folder / "config.json")}
    if (folder / GENERATION).is_file():
        configs[folder / GENERATION] = read_json(folder / GENERATION)
    elif "eos_token_id" not in configs[folder / "config.json"]:
        return (LLAMA_EOS,)
    found: dict[int, None] = {}
    for path, config in configs.items():
        given = config.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(token) is int and -1 <= token < 2**31 for token in ids):
            raise ConfigError(
                f"eos_token_id in {path} is {quoted(given)}, but it must be a token's id, a list "
                "of ids, or null."
            )
        found |= dict.fromkeys(token for token in ids if token >= 0)
    return tuple(found)


def load_dtype(path_or_name: str | Path) -> str:
    """The dtype of the weights by config.json; "auto" where it names none that Picotron computes
    in.
    """
    config = read_json(find_folder(path_or_name, ["config.json"]) / "config.json")
    dtype = config.get("dtype", config.get("torch_dtype"))
    return str(dtype) if dtype in DTYPES else "auto"


def read_generation_config(path_or_name: str | Path) -> bytes | None:
    """The generation_config.json of a folder or of a hub repository; None where it has none. A
    byte-order mark, which transformers does not read, is left out.

    Raises: ConfigError when it cannot be read as JSON.
    """
    path = find_folder(path_or_name, [GENERATION]) / GENERATION
    if not path.exists():
        return None
    read_json(path)
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def load_weights(model: Llama, path_or_name: str | Path) -> None:
    """Fill the model's parameters in place; see `stored_weights`."""
    fill(model, stored_weights(model, path_or_name))


def stored_weights(model: Llama, path_or_name: str | Path, *, resize: bool = False) -> Values:
    """The values in model.safetensors, or in the shards of its index, for a whole model, which may
    be on the meta device; each is read when it is asked for.

    They are in the file's dtype, on the CPU. A tied head may be absent from the file. Rotary
    frequencies in old checkpoints are not read: the architecture gives them.

    Args:
        resize: whether the embedding and the head may have fewer rows in the file than in the
            model; each of the others is the mean of those in the file.

    Raises: ConfigError that names the tensors that are missing, unexpected, of another shape or of
        no float dtype, or a tied head that differs from the embedding.
    """
    folder = find_folder(path_or_name, ["*.safetensors", "*.json"])
    files = tensor_files(folder)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    tied = model.architecture.tie_word_embeddings
    may_have = wanted.keys() | ({_HEAD} if tied else set())
    _refuse_any("lack", wanted.keys() - names, folder)
    _refuse_any("have, but the model does not,", names - may_have, folder)
    with _readable(folder):
        from safetensors import safe_open

        shards: dict[str, Any] = {
            file: safe_open(folder / file, framework="pt", device="cpu")
            for file in sorted(set(files.values()))
        }
        read = {name: shards[files[name]] for name in sorted(names)}
        for name, shard in read.items():
            shape = wanted[_EMBEDDING if tied and name == _HEAD else name]
            if resize and name in (_EMBEDDING, _HEAD):
                shape = torch.Size((load_architecture(folder).vocab_size, *shape[1:]))
            _check_tensor(name, shard.get_slice(name), shape, folder)
        if tied and _HEAD in read:
            head, embedding = (read[name].get_slice(name) for name in (_HEAD, _EMBEDDING))
            _check_tied_head(head, embedding, folder)

    def value(name: str) -> Tensor:
        with _readable(folder):
            found: Tensor = read[name].get_tensor(name)
        if not found.isfinite().all():
            raise ConfigError(
                f"{name} in {folder / files[name]} has numbers that are not finite: the file is "
                "damaged, or its training failed. Fetch it anew."
            )
        return _with_rows(found, wanted[name][0])

    return value


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"The weights in {folder} cannot be read: {reason(error)}.") from error


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


def _check_tied_head(head: Any, embedding: Any, folder: Path) -> None:
    """Row by row: neither is read whole."""
    rows = head.get_shape()[0]
    for start in range(0, rows, _ROWS):
        some = slice(start, min(rows, start + _ROWS))
        if not torch.equal(head[some], embedding[some]):
            raise ConfigError(
                f"{folder} has tie_word_embeddings, but its {_HEAD} differs from {_EMBEDDING}: set "
                "tie_word_embeddings to false in its config.json."
            )


def _with_rows(stored: Tensor, rows: int) -> Tensor:
    """A matrix, or a vector, with rows added that are the mean of its own: a new token is then as
    likely as the old ones are on average, and does not upset what the model says of them.
    """
    missing = rows - len(stored)
    if not missing:
        return stored
    total = torch.zeros(stored.shape[1], dtype=torch.float64)
    for start in range(0, len(stored), _ROWS):  # else it would be in memory twice again
        total += stored[start : start + _ROWS].double().sum(dim=0)
    mean = (total / len(stored)).to(stored.dtype)
    return torch.cat([stored, mean.expand(missing, -1)])
