"""`picotron export`: a trained model as the folder that Hugging Face's libraries read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from os.path import lexists
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from picotron_core.checkpoint.header import MASTER
from picotron_core.checkpoint.load import Checkpoint
from picotron_core.cli.runs import model_of, open_run
from picotron_core.config import load_settings
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, RunError
from picotron_core.files import (
    make_folder,
    new_folder,
    remove_tree,
    rename,
    replace_bytes,
    replace_text,
)
from picotron_core.parallel.piece import whole

WEIGHTS = "model.safetensors"


def run_export(path: Path, folder: Path, *, dtype: str, shard_mb: float) -> int:
    """Write config.json, the weights in one file or in shards with their index, and the tokenizer.

    Raises: ConfigError where the folder is there already; RunError where it cannot be written.
    """
    run, checkpoint = open_run(path)
    if lexists(folder):
        raise ConfigError(f"{folder} exists already: give a new folder.")
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        remove_tree(temporary)
        new_folder(temporary)
        _write(run, checkpoint, temporary, getattr(torch, dtype), shard_mb * 1e6)
        rename(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter hides that the disk is full
        raise RunError(f"Cannot write {folder}: {error}.") from None
    finally:  # also where a signal or another error came
        remove_tree(temporary)
    print(f"{checkpoint.folder} as {folder}:\n")
    print(f"  AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    return 0


def _write(
    run: RunDirectory, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, shard: float
) -> None:
    config = load_settings(run.config, env={}).config
    record = model_of(run, checkpoint.manifest.facts, config)
    described = {
        **record.architecture.to_transformers(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    replace_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
    for name, content in record.files_of_use.items():
        make_folder((folder / name).parent)
        replace_bytes(folder / name, content)
    parts = list(_parts(checkpoint, shard / dtype.itemsize))
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file_name = WEIGHTS
        if len(parts) > 1:
            file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        shapes = {name: checkpoint.manifest.parameters[name] for name in names}
        tensors = {
            name: _in(dtype, name, checkpoint.read(MASTER, name, whole(prod(shape))).view(shape))
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file_name)
    if len(parts) > 1:
        size = sum(prod(shape) for shape in checkpoint.manifest.parameters.values())
        index = {"metadata": {"total_size": dtype.itemsize * size}, "weight_map": where}
        replace_text(folder / f"{WEIGHTS}.index.json", json.dumps(index, indent=2) + "\n")


def _in(dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """Raises: RunError for a number that has no place in the dtype: it would become infinite."""
    converted = tensor.to(dtype)
    if not converted.isfinite().all():
        raise RunError(
            f"{name} has numbers up to {tensor.abs().max().item():.6g}, above {dtype}'s "
            f"{torch.finfo(dtype).max:.6g}. Give --dtype bfloat16 or float32."
        )
    return converted


def _parts(checkpoint: Checkpoint, limit: float) -> Iterator[list[str]]:
    """The parameters' names, in files of at most `limit` numbers; a larger one has its own."""
    names: list[str] = []
    size = 0
    for name, shape in checkpoint.manifest.parameters.items():
        if names and size + prod(shape) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += prod(shape)
    yield names
