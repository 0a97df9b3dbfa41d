"""loss.png: the losses of one run or several over their steps."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from picotron_core.engine.metrics_scan import Curve, Floats, Integers
from picotron_core.files import replace_bytes

SMOOTHING = 0.9  # of the drawn average: enough to see a trend through a small batch's noise
BINS = 800  # of the steps, where there are more than the picture has pixels
COLOURS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#cb181d", "#525252", "#8c6d31", "#08306b")


def plot_losses(curves: Mapping[str, Curve], path: Path, *, title: str) -> bool:
    """Draw the losses of runs into one picture.

    Args:
        curves: by the name of the run.
        path: of a PNG file, which is replaced.

    Returns: False where matplotlib (extra `plot`) is not installed.

    Raises: OSError.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if len(curves) == 1:
        _draw_one(axes, *curves.values())
    else:
        for index, (name, curve) in enumerate(curves.items()):
            _draw_among_others(axes, curve, name, COLOURS[index % len(COLOURS)])
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title(_printable(title), parse_math=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        for text in axes.legend(frameon=False).get_texts():
            text.set_parse_math(False)  # a name with two dollar signs is no formula
    picture = BytesIO()
    figure.savefig(picture, format="png")
    replace_bytes(path, picture.getvalue())
    return True


def _draw_one(axes: Any, curve: Curve) -> None:
    if len(curve.steps):
        axes.plot(*_range(curve), color="#9ecae1", linewidth=0.8, label="training loss")
        axes.plot(*_average(curve), color="#08519c", label="its moving average")
    if len(curve.val_steps):
        label = f"validation loss, last {curve.val_losses[-1]:.3f}"
        style = "o-" if len(curve.val_steps) < BINS else "-"
        axes.plot(curve.val_steps, curve.val_losses, style, color="#d94801", label=label)


def _draw_among_others(axes: Any, curve: Curve, name: str, colour: str) -> None:
    """The average as a line; the validation losses, too, as a dashed one."""
    label = _printable(name)
    if len(curve.steps):
        axes.plot(*_average(curve), color=colour, label=label)
        label = f"{label}, validation"
    if len(curve.val_steps):
        axes.plot(
            *(curve.val_steps, curve.val_losses, "--"), color=colour, linewidth=1, label=label
        )


def _printable(text: str) -> str:
    """A name without what no font can draw; bytes that are not UTF-8 are among that."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _range(curve: Curve) -> tuple[Integers, Floats]:
    """The losses as they are; of many, the lowest and the highest of each bin."""
    begins = _bins(curve)
    if len(begins) == len(curve.steps):
        return curve.steps, curve.losses
    low = np.minimum.reduceat(curve.losses, begins)
    high = np.maximum.reduceat(curve.losses, begins)
    return np.repeat(curve.steps[begins], 2), np.column_stack([low, high]).ravel()


def _average(curve: Curve) -> tuple[Integers, Floats]:
    """The moving average; of many losses, the mean of each bin, which has more of them."""
    begins = _bins(curve)
    if len(begins) == len(curve.steps):
        return curve.steps, _smooth(curve.losses)
    counts = np.diff(np.append(begins, len(curve.steps)))
    return curve.steps[begins], np.add.reduceat(curve.losses, begins) / counts


def _bins(curve: Curve) -> Integers:
    """Where the bins of equally many losses begin."""
    count = len(curve.losses)
    return np.arange(count) if count <= 20 * BINS else np.arange(BINS) * count // BINS


def _smooth(values: Floats) -> Floats:
    """Exponential moving average, with the start-up bias divided out."""
    average, weight, smoothed = 0.0, 0.0, np.empty(len(values))
    for index, value in enumerate(values):
        average = SMOOTHING * average + (1 - SMOOTHING) * float(value)
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed[index] = average / weight
    return smoothed
