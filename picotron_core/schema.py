"""The settings themselves: every section and key, typed, with its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from picotron_core.bounds import (
    STEPS,
    FolderText,
    PathText,
    RunName,
    Text,
    TimeLimit,
    zero_or_from,
)

CONTEXT = 2**27  # tokens: the longest sequence, far above what any model was trained for


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RopeScaling(Section):
    rope_type: Literal["llama3", "linear"] = Field("llama3", description="The kind of scaling.")
    factor: float = Field(8.0, ge=1, le=1e6, description="How much longer the context becomes.")
    low_freq_factor: float = Field(
        1.0, ge=1e-3, le=1e6, description="llama3: where full scaling begins."
    )
    high_freq_factor: float = Field(4.0, ge=1e-3, le=1e6, description="llama3: where scaling ends.")
    original_max_position_embeddings: int = Field(
        8192, ge=1, le=CONTEXT, description="llama3: the context the frequencies were trained for."
    )


class Model(Section):
    """The architecture, by the names of transformers' `LlamaConfig`."""

    path: PathText = Field(
        "", description="A Hugging Face folder or hub name; its config replaces the fields below."
    )
    pretrained: bool = Field(True, description="With `path`: start from its weights as well.")
    resize_embeddings: bool = Field(
        False,
        description="With `path`: add rows to embedding and head for a tokenizer of more tokens, "
        "each the mean of the old ones.",
    )
    hidden_size: int = Field(256, ge=1, le=2**17, description="Model dim E.")
    intermediate_size: int = Field(704, ge=1, le=2**22, description="Width of the SwiGLU MLP.")
    num_hidden_layers: int = Field(6, ge=1, le=2048, description="Number of layers.")
    num_attention_heads: int = Field(8, ge=1, le=8192, description="Query heads H.")
    num_key_value_heads: int = Field(4, ge=1, le=8192, description="Key/value heads K; divides H.")
    head_dim: int = Field(0, ge=0, le=8192, description="Head dim D; 0 means hidden_size / heads.")
    max_position_embeddings: int = Field(2048, ge=1, le=CONTEXT, description="The longest context.")
    rope_theta: float = Field(10000.0, ge=1, le=1e12, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(None, description="Rotary scaling, as in Llama 3.")
    tie_word_embeddings: bool = Field(True, description="The head shares the embedding's weight.")
    rms_norm_eps: float = Field(1e-5, ge=1e-12, le=1, description="Epsilon of every norm.")
    initializer_range: float = Field(
        0.02, ge=1e-6, le=10, description="Deviation of the initial weights."
    )


class Data(Section):
    """The text, and how it becomes tokens."""

    paths: list[PathText] = Field(
        default_factory=list,
        description="Files of text, JSON or Parquet, compressed or not; folders; `-` for standard "
        "input; or Hugging Face dataset names. Nothing means the source of Python's standard "
        "library on this machine.",
    )
    text_field: Text = Field("text", description="The field or column that holds the text.")
    on_bad: Literal["error", "skip"] = Field(
        "error", description="What to do with a record without text: stop, or skip and count it."
    )
    split: Text = Field("train", description="The split of a Hugging Face dataset.")
    tokenizer: PathText = Field(
        "", description="A Hugging Face tokenizer (folder or hub name); nothing means: train one."
    )
    vocab_size: int = Field(
        4096, ge=257, le=2**20, description="Tokens of the tokenizer that is trained."
    )
    seq_len: int = Field(256, ge=1, le=CONTEXT, description="Tokens per sample.")
    val_fraction: float = Field(
        0.05, ge=1e-6, le=0.99, description="Share held out for validation."
    )
    document_mask: bool = Field(
        False, description="A token attends only within its own document (`doc_ids`)."
    )
    cache_dir: FolderText = Field(
        "~/.cache/picotron", description="Where tokenised corpora are kept."
    )


class Train(Section):
    """The optimisation."""

    steps: int = Field(1000, ge=1, le=STEPS, description="Optimizer steps in all.")
    micro_batch: int = Field(8, ge=1, le=2**16, description="Samples per forward, on each rank.")
    accumulation: int = Field(1, ge=1, le=2**16, description="Micro-batches per optimizer step.")
    lr: float = Field(1e-3, ge=1e-12, le=100, description="Peak learning rate.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate over the peak.")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="Decay after warmup; wsd holds the peak, then decays at the end."
    )
    warmup_steps: int = Field(50, ge=0, le=STEPS, description="Steps of linear warmup.")
    decay_steps: int = Field(
        0,
        ge=0,
        le=STEPS,
        description="The step at which the decay ends, after which the rate stays; 0: `steps`.",
    )
    decay_fraction: float = Field(
        0.2, ge=1e-3, le=1, description="wsd: the share of these steps that the last decay takes."
    )
    weight_decay: float = Field(
        0.1, ge=0, le=100, description="Decoupled; not on norms and embeddings."
    )
    beta1: float = Field(0.9, ge=0, le=0.9999, description="AdamW's first-moment decay.")
    beta2: float = Field(0.95, ge=0, le=0.999999, description="AdamW's second-moment decay.")
    eps: float = Field(1e-8, ge=1e-20, le=1, description="AdamW's epsilon.")
    clip: Annotated[float, zero_or_from(1e-6)] = Field(
        1.0, ge=0, le=1e9, description="Largest global gradient norm; 0 means no limit."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute dtype; master weights are always float32."
    )
    reduce_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="What gradients travel between ranks in: auto is float32; 16 bits halve the "
        "traffic.",
    )
    loss_scale: float = Field(
        65536.0,
        ge=1e-6,
        le=1e12,
        description="float16: the first factor on the loss; it adapts.",
    )
    loss_scale_growth: int = Field(
        2000, ge=1, le=STEPS, description="float16: steps without overflow after which it doubles."
    )
    max_skips: int = Field(
        30, ge=1, le=10**6, description="float16: overflows in a row after which the run stops."
    )
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Of the initial weights and of the data's order."
    )
    eval_every: int = Field(
        200, ge=0, le=STEPS, description="Steps between evaluations; 0: only at the end."
    )
    eval_samples: int = Field(
        256,
        ge=1,
        le=10**7,
        description="Validation samples per evaluation, spread evenly over the text.",
    )


class Parallel(Section):
    """How the ranks divide the work. What these leave of the ranks are replicas of the model."""

    pp: int = Field(
        1, ge=1, le=2048, description="Stages that divide the layers (pipeline parallelism)."
    )
    schedule: Literal["1f1b", "afab", "interleaved"] = Field(
        "1f1b", description="With pp: in which order a stage takes its micro-batches."
    )
    chunks: int = Field(
        2, ge=1, le=256, description="interleaved: chunks of layers that each stage has."
    )
    cp: int = Field(
        1, ge=1, le=2**16, description="Ranks that divide each sequence (context parallelism)."
    )
    tp: int = Field(
        1,
        ge=1,
        le=8192,
        description="Ranks that divide each matrix of the model (tensor parallelism).",
    )
    sequence: bool = Field(
        False, description="With tp: divide the tokens between the blocks as well."
    )
    zero: int = Field(
        0, ge=0, le=1, description="1 divides the optimizer's state among replicas (ZeRO stage 1)."
    )
    bucket_mb: float = Field(
        25.0, ge=0.001, le=1e5, description="Megabytes of float32 gradients that travel together."
    )


class Checkpoint(Section):
    """What is kept of a run."""

    every: Annotated[int, Field(ge=0, le=STEPS)] | Literal["auto"] = Field(
        500,
        description="Steps between checkpoints; 0: only at the end; auto: as often as costs at "
        "most 3.5 % of the time.",
    )
    keep: int = Field(2, ge=2, le=10**6, description="How many of the newest checkpoints are kept.")
    max_mb_per_s: Annotated[float, zero_or_from(0.01)] = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Megabytes a second that each rank writes at most; 0: no limit.",
    )
    max_misses: int = Field(
        3,
        ge=1,
        le=10**6,
        description="Saves in a row that the disk may refuse before the run stops.",
    )
    max_fallbacks: int = Field(
        2,
        ge=0,
        le=10**6,
        description="How often a run that fails right after a load goes back one further.",
    )


class Run(Section):
    """Where a run goes and what it prints."""

    dir: FolderText = Field("runs", description="The folder that run folders are made in.")
    name: RunName = Field("", description="The run's folder; nothing means one from the date.")
    resume: bool = Field(
        False,
        description="Go on with the run of this name if there is one: for a job that is started "
        "again.",
    )
    device: Text = Field(
        "auto",
        description="auto, cpu, cuda, or a card to simulate: its choices on the device that is "
        "here, e.g. t4, p100@2.13+cu130.",
    )
    log_every: int = Field(10, ge=1, le=STEPS, description="Steps between printed lines in a pipe.")
    sample: Text = Field("", description="A prompt to continue when training ends.")
    time_limit: TimeLimit = Field(
        "",
        description="Stop and save so as to be done by then: minutes, hours:minutes:seconds or "
        "days-hours, as for Slurm's --time.",
    )
    timeout_s: float = Field(
        600.0, ge=1, le=1e6, description="Longest wait for another rank, in seconds."
    )
    trace: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Steps to record, after two that warm up: what every rank did and said, for "
        "`picotron trace`; `--trace` records two.",
    )


class Plugins(Section):
    """Third-party plugins: installed is not enabled."""

    enable: list[Text] = Field(default_factory=list, description="Names of plugins to load.")


class Config(Section):
    """Everything that decides a run, with the seed."""

    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    parallel: Parallel = Field(default_factory=Parallel)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    run: Run = Field(default_factory=Run)
    plugins: Plugins = Field(default_factory=Plugins)
    backends: dict[str, str | list[str]] = Field(
        default_factory=dict,
        description="Backends by op: a name, names in order of preference, or auto.",
    )


def fields() -> Iterable[tuple[str, FieldInfo]]:
    """Every setting: ("train.steps", its field), in the order of the sections."""
    for section, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, setting in field.annotation.model_fields.items():
                yield f"{section}.{name}", setting
                if setting.annotation == RopeScaling | None:
                    for inner, scaling in RopeScaling.model_fields.items():
                        yield f"{section}.{name}.{inner}", scaling
        else:
            yield section, field
