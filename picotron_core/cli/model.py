"""The model that the settings describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from picotron_core.checkpoint.commit import listed
from picotron_core.checkpoint.manifest import read_manifest
from picotron_core.engine.model_record import read_architecture
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, DamagedFileError
from picotron_core.model.architecture import Architecture
from picotron_core.parallel.parallelize import refuse_layout
from picotron_core.schema import Config


def architecture_of(
    config: Config, vocab_size: int, *, bos_id: int | None = None, eos_id: int | None = None
) -> Architecture:
    """The architecture of `[model]`: a Hugging Face folder's, or the fields with that vocabulary.

    Args:
        bos_id, eos_id: the tokens that begin and end a text; used only where no folder names them.

    Raises: ConfigError where the folder's embedding is smaller than the vocabulary, and is not to
        be resized.
    """
    model = config.model
    if model.path:
        from picotron_core.model.pretrained import load_architecture

        architecture = load_architecture(model.path)
        if vocab_size <= architecture.vocab_size:
            return architecture
        if not model.resize_embeddings:
            raise ConfigError(
                f"The tokenizer has {vocab_size} tokens, but the model of {model.path} embeds "
                f"{architecture.vocab_size}. Give --model.resize_embeddings true to add the rest, "
                "or leave data.tokenizer empty to take the model's own."
            )
        return replace(architecture, vocab_size=vocab_size)
    fields = model.model_dump(
        exclude={"path", "pretrained", "resize_embeddings", "head_dim", "rope_scaling"}
    )
    if model.head_dim:
        fields["head_dim"] = model.head_dim
    fields["rope_parameters"] = {
        "rope_theta": fields.pop("rope_theta"),
        **(model.rope_scaling.model_dump() if model.rope_scaling else {"rope_type": "default"}),
    }
    return Architecture.from_transformers(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            **fields,
        }
    )


def draft_of(config: Config, resumed: RunDirectory | None = None) -> Architecture:
    """The architecture before there is a tokenizer: its vocabulary is the one asked for.

    Args:
        resumed: the run to go on with, whose own folder then describes it; `run.resume` may also
            mean one.
    """
    run = resumed or _begun(config)
    if run and (run.model.exists() or _has_record(run)):
        return read_architecture(run)
    return architecture_of(config, 1 if config.model.path else config.data.vocab_size)


def _has_record(run: RunDirectory) -> bool:
    """Whether its newest checkpoint names the files of its model, as earlier versions did not."""
    for folder in listed(run.checkpoints):
        try:
            return bool(read_manifest(folder).facts.files)
        except DamagedFileError:
            continue
    return False


def _begun(config: Config) -> RunDirectory | None:
    """The run that `run.resume` goes on with, if it has saved something."""
    if not (config.run.resume and config.run.name):
        return None
    run = RunDirectory(Path(config.run.dir).expanduser() / config.run.name)
    return run if listed(run.checkpoints) else None


def replicas_of(config: Config, architecture: Architecture, world_size: int) -> int:
    """How many copies of the model so many ranks hold.

    Raises: ConfigError for a layout that this model, or this number of ranks, does not allow.
    """
    return refuse_layout(
        config.parallel,
        architecture,
        world_size=world_size,
        seq_len=config.data.seq_len,
        accumulation=config.train.accumulation,
    )
