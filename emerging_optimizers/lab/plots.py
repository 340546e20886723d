"""The figures of the lab: functions from results to a file. The only place that imports matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from emerging_optimizers.lab.eigenbasis import EigenbasisResult
from emerging_optimizers.lab.record import RunResult
from emerging_optimizers.lab.report import BASELINE, baseline_loss
from emerging_optimizers.lab.spike import SpikeResult

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


def plot_spike_warmup(result: SpikeResult, path: Path) -> None:
    """Draws the update RMS of each optimizer from its first step, without a spike.

    Args:
        result: The sweep.
        path: The picture to write.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for arm, style in zip(result.arms, _arm_styles(result), strict=True):
        rms = arm.no_spike.rms[: result.config.warmup_steps]
        axes.plot(range(1, len(rms) + 1), rms, label=arm.name, **style)
    axes.set_yscale("log")
    _label(axes, "step", "update RMS")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_spike_sweep(result: SpikeResult, path: Path) -> None:
    """Draws the update RMS around each spike: a panel a spike, by time and size, a line an optimizer.

    Args:
        result: The sweep.
        path: The picture to write.
    """
    times, sizes = sorted(result.config.spike_at), sorted(result.config.spike_scale)
    figure, grid = plt.subplots(
        *(len(times), len(sizes)),
        figsize=(1 + 3.7 * len(sizes), 1 + 2.6 * len(times)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for at, row in zip(times, grid, strict=True):
        for scale, axes in zip(sizes, row, strict=True):
            for arm, style in zip(result.arms, _arm_styles(result), strict=True):
                rms = arm.trajectory((at, scale)).rms
                axes.plot(range(1, len(rms) + 1), rms, label=arm.name, **style)
            axes.axvline(at + 1, color=DARK, linestyle=":", linewidth=1)
            axes.set_yscale("log")
            axes.set_title(f"×{scale:g} after {at} steps", fontsize="medium")
            _label(axes, "step" if at == times[-1] else "", "update RMS" if scale == sizes[0] else "")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(result.arms), frameon=False
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_spike_aftershock(result: SpikeResult, path: Path) -> None:
    """Draws the largest update after each spike over the spike's size; faint: the largest before it.

    Args:
        result: The sweep.
        path: The picture to write.
    """
    times = sorted(result.config.spike_at)
    figure, (panels,) = plt.subplots(
        *(1, len(times)), figsize=(1 + 3.7 * len(times), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for at, axes in zip(times, panels, strict=True):
        for i, (arm, style) in enumerate(zip(result.arms, _arm_styles(result), strict=True)):
            rows = [row for row in arm.rows if row.spike_at == at]
            sizes = [row.spike_scale for row in rows]
            axes.plot(sizes, [row.aftershock for row in rows], label=arm.name, marker=MARKERS[i % 6], **style)
            axes.plot(sizes, [row.before for row in rows], alpha=0.3, **{**style, "linestyle": ":"})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"spike after {at} steps", fontsize="medium")
        first = at == times[0]
        _label(axes, "size of the spike", "largest update RMS after the spike (dotted: before)" if first else "")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(result.arms), frameon=False
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _arm_styles(result: SpikeResult) -> list[dict[str, Any]]:
    """A colour for each optimizer; its variants after the first are dashed, dash-dotted, dotted."""
    colors = {name: color for name, (color, _) in _styles([arm.arm.optimizer for arm in result.arms]).items()}
    seen: list[str] = []
    styles = []
    for arm in result.arms:
        line = ("-", "--", "-.", ":")[seen.count(arm.arm.optimizer) % 4]
        seen.append(arm.arm.optimizer)
        styles.append({"color": colors[arm.arm.optimizer], "linestyle": line, "linewidth": 1.2})
    return styles


def plot_eigenbasis(result: EigenbasisResult, path: Path) -> None:
    """Draws the angles to the basis before the spike and the update RMS over the steps, a column an optimizer.

    Args:
        result: The runs.
        path: The picture to write.
    """
    config = result.config
    columns = len(config.optimizers)
    figure, panels = plt.subplots(
        *(2, columns), figsize=(1 + 4.5 * columns, 6), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    styles = _styles(sorted({run.precision for run in result.runs}))
    steps = range(1, config.steps + 1)
    for (angles, updates), optimizer in zip(panels.T, config.optimizers, strict=True):
        for run in result.runs:
            if run.optimizer != optimizer:
                continue
            color = DARK if run.precision == "highest" else styles[run.precision][0]
            angles.plot(steps, run.topk_left, color=color, label=f"Q_L at {run.precision}")
            angles.plot(steps, run.topk_right, color=color, linestyle=":", label=f"Q_R at {run.precision}")
            updates.plot(steps, run.update_rms, color=color, linewidth=1, label=run.precision)
        for axes in (angles, updates):
            axes.axvline(config.spike_at + 1, color=DARK, alpha=0.3, linewidth=6, zorder=0)
        angles.set_title(optimizer)
        angles.set_ylim(-3, 93)
        angles.set_yticks(range(0, 91, 15))
        updates.set_yscale("log")
        first = optimizer == config.optimizers[0]
        _label(angles, "", f"degrees from step {config.spike_at}, top-{config.top}" if first else "")
        _label(updates, "step (grey: the spike)", "update RMS" if first else "")
    panels[0, -1].legend(loc="center right")
    panels[1, -1].legend(frameon=False)
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
