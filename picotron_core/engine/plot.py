"""loss.png: the losses of a run over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOOTHING = 0.9  # of the drawn average: enough to see a trend through a small batch's noise


def plot_losses(lines: Sequence[dict[str, Any]], path: Path, *, title: str) -> bool:
    """Draw the lines of metrics.jsonl. False where matplotlib (extra `plot`) is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib.figure import Figure

    made = [line for line in lines if "loss" in line and not line["skipped"]]
    steps = [(line["step"], line["loss"]) for line in made]
    evaluations = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color="#9ecae1", linewidth=0.8, label="training loss")
        axes.plot(numbers, _smooth(losses), color="#08519c", label="its moving average")
    if evaluations:
        numbers, losses = zip(*evaluations, strict=True)
        label = f"validation loss, last {losses[-1]:.3f}"
        axes.plot(numbers, losses, "o-", color="#d94801", label=label)
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if steps or evaluations:
        axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, with the start-up bias divided out."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed
