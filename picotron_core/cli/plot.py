"""`picotron plot`: the losses of one run or several in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from picotron_core.engine.metrics_scan import read_curve
from picotron_core.engine.plot import plot_losses
from picotron_core.engine.run_directory import RunDirectory
from picotron_core.errors import ConfigError, RunError, quoted


def run_plot(paths: Sequence[Path], output: Path) -> None:
    """Draw the losses of these runs.

    Args:
        paths: folders of runs, and folders that hold such folders.
        output: of a PNG file, which is replaced.
    """
    if output.suffix.lower() != ".png":  # also lest it be a run's own file, which is replaced
        raise ConfigError(f"--output {quoted(str(output))} names no PNG file: write NAME.png.")
    runs = [run for path in paths for run in _runs(path)]
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    curves = {name: read_curve(run) for name, run in zip(names, runs, strict=True)}
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    try:
        drawn = plot_losses(curves, output, title=title)
    except OSError as error:
        raise RunError(
            f"Cannot write {output}: {error.strerror}. Give another file with --output."
        ) from None
    if not drawn:
        raise ConfigError("Pictures need matplotlib: pip install 'picotron[plot]'")
    print(f"Wrote {output}: {', '.join(names)}")


def _runs(path: Path) -> list[RunDirectory]:
    run = RunDirectory(path)
    if run.metrics.exists():
        return [run]
    inside = [RunDirectory(metrics.parent) for metrics in sorted(path.glob("*/metrics.jsonl"))]
    if not inside:
        raise ConfigError(
            f"No run in {path}: neither it nor a folder in it has a metrics.jsonl. Give a run's "
            "folder, e.g. runs/demo."
        )
    return inside
