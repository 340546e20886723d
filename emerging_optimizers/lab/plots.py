"""The figures of the lab: functions from results to a file. The only place that imports matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from emerging_optimizers.lab.record import RunResult
from emerging_optimizers.lab.report import BASELINE, baseline_loss

# Okabe and Ito's palette, which colour-blind readers can tell apart; the baseline is dark.
DARK = "#222222"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_losses(results: Sequence[RunResult], path: Path) -> None:
    """Draws the loss over steps and over CPU seconds: held-out loss strong, training loss faint.

    Args:
        results: What each optimizer did with the job.
        path: The picture to write.
    """
    figure, (over_steps, over_seconds) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name, (color, marker) in _styles([result.optimizer for result in results]).items():
        result = next(result for result in results if result.optimizer == name)
        label = f"{name} (lr {result.arm.lr:g}): {result.final_loss:.2f}"
        for axes, key in ((over_steps, "step"), (over_seconds, "cpu_s")):
            train = [(getattr(step, key), step.loss) for step in result.steps]
            held_out = [(getattr(step, key), loss) for step, loss in result.evaluations]
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.2, linewidth=0.8)
            axes.plot(*zip(*held_out, strict=True), color=color, marker=marker, markersize=4, label=label)
    if (target := baseline_loss(results)) is not None:
        for axes in (over_steps, over_seconds):
            axes.axhline(target, color=DARK, linestyle="--", linewidth=1)
        over_steps.annotate(
            f"AdamW's best: {target:.2f}",
            xy=(0, target),
            xycoords=("axes fraction", "data"),
            xytext=(4, -4),
            textcoords="offset points",
            verticalalignment="top",
            color=DARK,
        )
    first = [result.evaluations[0][1] for result in results]
    over_steps.set_ylim(top=1.05 * max(filter(math.isfinite, first), default=1.0))
    _label(over_steps, "step", "loss, nats per character (held out; faint: training)")
    _label(over_seconds, "CPU seconds of training", "")
    over_steps.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_grid(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draws the final loss over the learning rate, a curve an optimizer, its best marked.

    Args:
        curves: Pairs of learning rate and final held-out loss for each optimizer, by rising rate.
        path: The picture to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (color, marker) in _styles(list(curves)).items():
        points = [point for point in curves[name] if math.isfinite(point[1])]
        if not points:
            continue
        lr, loss = min(points, key=lambda point: point[1])
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4)
        axes.plot(lr, loss, color=color, marker=marker, markersize=10, label=f"{name}: {loss:.2f} at {lr:g}")
    axes.set_xscale("log")
    _label(axes, "learning rate", "final held-out loss, nats per character")
    axes.legend(frameon=False, title="best")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker for each name; they repeat after six."""
    others = [name for name in names if name != BASELINE]
    styles = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(others)}
    return {name: styles.get(name, (DARK, ".")) for name in names}


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
