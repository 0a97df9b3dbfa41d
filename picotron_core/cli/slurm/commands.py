"""The options of `picotron slurm`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from picotron_core.cli.options import (
    SETTINGS_HELP,
    WITH_SETTINGS,
    Backends,
    Data,
    Device,
    Plugins,
    shorthands,
    split,
)
from picotron_core.errors import ConfigError, did_you_mean


class _SubmitByDefault(TyperGroup):
    """`picotron slurm CONFIG` is `picotron slurm submit CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else "--help"
        if first.endswith(".toml") or (first.startswith("-") and first not in ("-h", "--help")):
            args = ["submit", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_SubmitByDefault,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    help="Train as jobs of a Slurm cluster: `picotron slurm CONFIG.toml`, and what became of them.",
    epilog="Options of `picotron slurm CONFIG.toml`: picotron slurm submit --help",
)
Folder = Annotated[
    Path, typer.Argument(metavar="JOBFOLDER", help="What `picotron slurm` made: slurm/NAME.")
]
SbatchArguments = Annotated[
    list[str] | None,
    typer.Option("--sbatch-arg", help="An option of sbatch's own, as '--constraint=v100'."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@app.command(context_settings=WITH_SETTINGS, epilog=SETTINGS_HELP)
def submit(
    ctx: typer.Context,
    rest: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG.toml", show_default=False, help="Several: a job array."),
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Machines of each run.")] = 1,
    gpus_per_node: Annotated[
        str, typer.Option(help="GPUs of a machine, each with a rank: 4, or v100:4. [default: 1]")
    ] = "",
    ranks_per_node: Annotated[
        int, typer.Option(min=0, help="Ranks of a machine without GPUs.", show_default=False)
    ] = 0,
    cpus_per_task: Annotated[
        int, typer.Option(min=0, help="Cores of a rank.", show_default=False)
    ] = 0,
    mem: Annotated[str, typer.Option(help="Memory of a machine: 64G.")] = "",
    time: Annotated[str, typer.Option(help="Longest time of one start: 24:00:00.")] = "",
    partition: Annotated[str, typer.Option(help="As sbatch takes it.")] = "",
    account: Annotated[str, typer.Option(help="As sbatch takes it.")] = "",
    qos: Annotated[str, typer.Option(help="As sbatch takes it.")] = "",
    job_name: Annotated[
        str, typer.Option(help="Of the job and its folder; the config's unless given.")
    ] = "",
    max_running: Annotated[
        int, typer.Option(min=0, help="Runs of an array at a time; 0: all.", show_default=False)
    ] = 0,
    setup: Annotated[
        list[str] | None,
        typer.Option(help="A line of bash before the run: 'module load cuda'; repeatable."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="A variable of the ranks: NAME=VALUE; repeatable.")
    ] = None,
    sbatch_arg: SbatchArguments = None,
    python: Annotated[
        str, typer.Option(help="Python on the machines; the one that runs this unless given.")
    ] = "",
    requeue: Annotated[
        bool, typer.Option(help="Start again after preemption, failed nodes and the time limit.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")
    ] = False,
    data: Data = None,
    backends: Backends = "",
    plugin: Plugins = None,
    device: Device = "",
) -> int:
    """Submit a run, or an array of runs, one for each config.

    A run goes on from its last checkpoint whenever Slurm starts it again.
    """
    from picotron_core.cli.slurm.folder import free
    from picotron_core.cli.slurm.script import Batch
    from picotron_core.cli.slurm.submit import gpus_and_ranks, variables
    from picotron_core.cli.slurm.submit import submit as run_submit
    from picotron_core.config import load_settings
    from picotron_core.hardware import refuse_cpu_without_torch

    refuse_cpu_without_torch()  # the model is looked at, for what it allows
    paths, overrides = split(rest)
    for key, _ in overrides:
        if "." not in key:  # no setting: an option of this command, misspelt
            options = [name[2:] for option in ctx.command.params for name in option.opts]
            raise ConfigError(f"No option --{key}. {did_you_mean(key, options)}")
    if not paths:
        raise ConfigError("Which config? picotron slurm CONFIG.toml")
    if len(set(paths)) < len(paths):
        raise ConfigError("A config is given twice: each run of a job has its own.")
    overrides = [*shorthands(plugin, device, data), *overrides]
    configs = {path: load_settings(path, overrides, backends=backends) for path in paths}
    gpus, ranks = gpus_and_ranks(list(configs.values()), gpus_per_node, ranks_per_node)
    one = configs[paths[0]].config.run.name or paths[0].stem
    name = job_name or (one if len(paths) == 1 else "picotron")
    directory = Path.cwd()
    batch = Batch(
        name=name,
        folder=free(directory / "slurm", name),
        directory=directory,
        tasks=len(paths),
        nodes=nodes,
        ranks_per_node=ranks,
        gpus=gpus,
        python=python or sys.executable,
        max_running=max_running,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        mem=mem,
        requeue=requeue,
        setup=setup or (),
        env=variables(env or (), configs[paths[0]].rules),
        sbatch=sbatch_arg or (),
        backends=backends,
    )
    return run_submit(batch, configs, dry_run=dry_run)


@app.command()
def status(folder: Folder) -> int:
    """Say how far the runs of a job are."""
    from picotron_core.cli.slurm.status import show_status

    return show_status(folder)


@app.command()
def resubmit(folder: Folder, sbatch_arg: SbatchArguments = None, dry_run: DryRun = False) -> int:
    """Submit what has stopped again.

    That is: those runs of a job that are neither finished nor in the queue.
    """
    from picotron_core.cli.slurm.status import resubmit_stopped

    return resubmit_stopped(folder, sbatch_arg or (), dry_run=dry_run)


@app.command()
def csv(
    paths: Annotated[
        list[Path], typer.Argument(metavar="JOBFOLDER|RUN...", help="Jobs' folders, or runs'.")
    ],
) -> int:
    """Print a table of runs.

    A row for each: state, losses, speed, memory, and the settings that differ between them.
    """
    from picotron_core.cli.slurm.status import print_csv

    return print_csv(paths)
