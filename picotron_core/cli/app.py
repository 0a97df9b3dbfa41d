"""The commands and their options. What a command does is in the file of its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from picotron_core import __version__
from picotron_core.cli.options import (
    MOST_RANKS,
    SETTINGS_HELP,
    WITH_SETTINGS,
    Backends,
    Data,
    Device,
    Plugins,
    shorthands,
    split,
)
from picotron_core.cli.slurm.commands import app as slurm
from picotron_core.errors import ConfigError

if TYPE_CHECKING:
    from picotron_core.config import Settings

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the panels of rich cost --help a third of its time
    help="Train LLMs on the hardware you have. --debug shows the traceback of an error.",
    epilog="Start with: picotron train",
)
compare = typer.Typer(no_args_is_help=True, help="Train the same steps in several ways.")

Rest = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG.toml", show_default=False, help="A config.")
]

app.add_typer(compare, name="compare")
app.add_typer(slurm, name="slurm")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"picotron {__version__}")
        raise typer.Exit


@app.command(context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def train(
    rest: Rest = None,
    data: Data = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue a run: its folder, or auto for the newest.")
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_RANKS,
            help="Ranks to start on this machine; torchrun starts its own.",
        ),
    ] = 1,
    name: Annotated[str, typer.Option(help="The run's folder name: short for --run.name.")] = "",
    trace: Annotated[
        bool, typer.Option("--trace", help="Record two steps: short for --run.trace 2.")
    ] = False,
    backends: Backends = "",
    plugin: Plugins = None,
    device: Device = "",
) -> int:
    """Train a model, by default on the source of Python's standard library."""
    from picotron_core.cli.launch import launch, without_nproc
    from picotron_core.cli.resume import find_run
    from picotron_core.cli.train import run_training

    config, overrides = _split(rest)
    named = [("run.name", name)] if name else []
    named += [("run.trace", "2")] if trace else []
    overrides = [*shorthands(plugin, device, data), *named, *overrides]
    if resume is None:
        settings, found = _settings(config, overrides, backends=backends), None
    elif config is not None:
        raise ConfigError(f"--resume takes the run's own config.toml; leave out {config}.")
    else:
        found = find_run(resume, _settings(None, overrides, backends=backends).config.run.dir)
        overrides = [("run.trace", "0"), *overrides]  # what was recorded stays, unless asked anew
        settings = _settings(found[0].config, overrides, backends=backends)
    if nproc > 1:  # only now: a mistake in the settings is told once, and not by every rank
        return launch(
            nproc, without_nproc(sys.argv[1:]), settings.config, resume=found and found[0]
        )
    return run_training(settings, resume=found)


@app.command()
def generate(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, one of its checkpoints, or a Hugging Face folder.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most so many tokens; 200 unless given.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0 means all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest that sum to p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    backends: Backends = "",
    plugin: Plugins = None,
    device: Device = "",
) -> None:
    """Continue a prompt with a trained model."""
    from picotron_core.cli.generate import (
        is_model_folder,
        refuse_prompt_bytes,
        write_text,
        writer_of_folder,
        writer_of_run,
    )
    from picotron_core.cli.runs import open_run
    from picotron_core.engine.generate import refuse_options

    refuse_options(max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    refuse_prompt_bytes(prompt)
    words = shorthands(plugin, device)
    if is_model_folder(model):
        settings = _settings(None, words, backends=backends)
        writer = writer_of_folder(model)
    else:
        run, checkpoint = open_run(model)
        settings = _settings(run.config, words, backends=backends)
        writer = writer_of_run(settings, run, checkpoint)
    write_text(
        settings,
        writer,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


@app.command(no_args_is_help=True)
def checkpoint(
    action: Annotated[
        Literal["list", "verify", "inspect", "prune"],
        typer.Argument(
            help="list what there is; verify every byte; inspect one: the newest, or RUN itself; "
            "prune: remove all but the newest whole ones.",
        ),
    ],
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    keep: Annotated[int, typer.Option(min=1, max=10**6, help="prune: how many are left.")] = 2,
) -> int:
    """List, verify, inspect or prune the checkpoints of a run."""
    from picotron_core.cli.checkpoint import run_checkpoint

    return run_checkpoint(action, run, keep=keep)


@app.command(no_args_is_help=True)
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the numbers; float32 is what was trained."),
    ] = "float32",
    shard_mb: Annotated[
        float, typer.Option(min=0.001, max=10**6, help="Megabytes in a file.")
    ] = 2000,
) -> int:
    """Write a trained model as a Hugging Face folder, tokenizer included."""
    from picotron_core.cli.export import run_export

    return run_export(run, folder, dtype=dtype, shard_mb=shard_mb)


@app.command("verify-resume", context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def verify_resume(
    rest: Rest = None,
    steps: Annotated[int, typer.Option(min=2, max=10**9, help="Steps of the whole run.")] = 10,
    nproc: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Ranks of the whole run.")] = 1,
    then_nproc: Annotated[
        int, typer.Option(min=0, max=MOST_RANKS, help="Ranks that resume it; 0: as many.")
    ] = 0,
    then: Annotated[
        list[str] | None,
        typer.Option(help="A setting of the resumed half, e.g. parallel.tp=2; may be repeated."),
    ] = None,
) -> int:
    """Train N steps, and N/2 resumed to N; name the first tensor that differs."""
    from picotron_core.cli.verify_resume import run_verify_resume

    words = [word for word in rest or []]
    return run_verify_resume(
        words, steps=steps, nproc=nproc, then_nproc=then_nproc or nproc, then=then or []
    )


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="The folder of a run that was given --trace.")],
) -> int:
    """Show what every rank of a traced run did and said: numbers, a timeline, pictures."""
    from picotron_core.cli.trace.command import show_trace

    return show_trace(run)


@app.command(no_args_is_help=True)
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or a folder of them.")],
    output: Annotated[Path, typer.Option(help="The picture, a PNG file.")] = Path("losses.png"),
) -> None:
    """Draw the losses of one run or several in one picture."""
    from picotron_core.cli.plot import run_plot

    run_plot(runs, output)


@app.command()
def examples(
    name: Annotated[
        str, typer.Argument(show_default=False, help="The config to write; none: list them.")
    ] = "",
) -> None:
    """List the configs that come with Picotron, or write one into this folder."""
    from picotron_core.cli.examples import list_examples, write_example

    if name:
        write_example(name)
    else:
        list_examples()


@app.command(context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def backends(
    rest: Rest = None,
    device: Device = "",
    json: Annotated[bool, typer.Option("--json", help="The same as data.")] = False,
    backends: Backends = "",
    plugin: Plugins = None,
) -> int:
    """List every backend, who would serve each op on this device, and why others cannot."""
    from picotron_core.cli.backends import list_backends

    config, overrides = _split(rest)
    overrides = [*shorthands(plugin, device), *overrides]
    return list_backends(_settings(config, overrides, backends=backends), as_json=json)


@app.command(context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def doctor(
    rest: Rest = None,
    device: Device = "",
    json: Annotated[bool, typer.Option("--json", help="The same as data.")] = False,
    backends: Backends = "",
    plugin: Plugins = None,
) -> int:
    """Examine machine, torch, kernels, plugins and disk; say how to mend what is wrong."""
    from picotron_core.cli.doctor.command import run_doctor
    from picotron_core.config import load_settings

    # Not by `_settings`: it stops at a CPU that cannot import torch, which is for us to say.
    config, overrides = _split(rest)
    overrides = [*shorthands(plugin, device), *overrides]
    return run_doctor(load_settings(config, overrides, backends=backends), as_json=json)


@app.command(context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def plan(
    rest: Rest = None,
    device: Device = "",
    nproc: Annotated[
        int,
        typer.Option(
            "--nproc",
            min=0,
            max=10**6,
            help="Ranks that would train together; 0: as few as it takes.",
        ),
    ] = 0,
    data: Annotated[
        list[str] | None, typer.Option(help="Taken as `train` takes it, and not looked at.")
    ] = None,
    name: Annotated[str, typer.Option(help="As of `train`; nothing is written.")] = "",
    trace: Annotated[bool, typer.Option("--trace", help="As of `train`; without effect.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The same as data.")] = False,
    backends: Backends = "",
    plugin: Plugins = None,
) -> int:
    """Say what memory a run takes on a device, whether it fits, and how long a step may be."""
    from picotron_core.cli.plan import plan as run_plan

    config, overrides = _split(rest)
    overrides = [*shorthands(plugin, device), *overrides]
    settings = _settings(config, overrides, backends=backends)
    return run_plan(settings, nproc=nproc, as_json=json)


@compare.command("dp-zero", context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def compare_dp_zero(
    rest: Rest = None,
    nproc: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_RANKS,
            help="Ranks to start; 0: two, or those that torchrun started.",
        ),
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, max=10**9, help="Steps of each trial of time.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write the numbers of all ranks there.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="As of `train`.")] = None,
    backends: Backends = "",
    plugin: Plugins = None,
    device: Device = "",
) -> int:
    """Plain replicas against ZeRO-1: the same losses? bytes sent, memory, time of a step."""
    from picotron_core.cli.compare.dp_zero import compare_dp_zero
    from picotron_core.cli.launch import launch, without_nproc
    from picotron_core.parallel.world import is_rank

    config, overrides = _split(rest)
    overrides = [*shorthands(plugin, device, data), *overrides]
    settings = _settings(config, overrides, backends=backends)
    if nproc or not is_rank():
        return launch(nproc or 2, without_nproc(sys.argv[1:]), settings.config)
    return compare_dp_zero(settings, steps=steps, output=json)


@app.command(context_settings=WITH_SETTINGS)
def config(
    rest: Rest = None,
    backends: Backends = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page of Markdown.")] = False,
) -> None:
    """List every setting with its value, default and meaning."""
    from picotron_core.cli.config import list_settings

    path, overrides = _split(rest)
    list_settings(_settings(path, overrides, backends=backends), markdown=markdown)


@app.command(context_settings=WITH_SETTINGS)
def quarantine(
    action: Annotated[
        Literal["list", "clear"],
        typer.Argument(help="list what the trials found, or clear it: try again."),
    ] = "list",
    plugin: Annotated[str, typer.Argument(show_default=False, help="Of this plugin alone.")] = "",
    cache_dir: Annotated[
        str, typer.Option("--data.cache_dir", help="Where the trials are kept.")
    ] = "",
) -> int:
    """List the trials of plugins, and clear them so that a plugin is tried again."""
    from picotron_core.cli.quarantine import run_quarantine

    overrides = [("data.cache_dir", cache_dir)] if cache_dir else []
    return run_quarantine(_settings(None, overrides), action, plugin)


@app.command(no_args_is_help=True)
def conformance(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT.json | verify CERTIFICATE.json",
            show_default=False,
            help="A report of `pytest --pyargs picotron_conformance --picotron-report FILE`; or "
            "verify, and a certificate of --picotron-certificate FILE.",
        ),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write the matrix as one page for a browser.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print it as Markdown: the default without --html.")
    ] = False,
) -> int:
    """Show a report of the conformance suite as a matrix, or verify a certificate."""
    from picotron_core.cli.conformance import run_conformance

    return run_conformance(words, html=html, markdown=markdown)


def _settings(
    path: Path | None, overrides: list[tuple[str, str]], *, backends: str = ""
) -> Settings:
    from picotron_core.config import load_settings  # late: --help need not wait for pydantic
    from picotron_core.hardware import refuse_cpu_without_torch

    refuse_cpu_without_torch()
    return load_settings(path, overrides, backends=backends)


def _split(rest: list[str] | None) -> tuple[Path | None, list[tuple[str, str]]]:
    """The one config file, and the settings."""
    paths, overrides = split(rest)
    if len(paths) > 1:
        raise ConfigError(f"Two config files, {paths[0]} and {paths[1]}: give one.")
    return paths[0] if paths else None, overrides
