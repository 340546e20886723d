"""The figures of the lab: functions from results to a file. The only place that imports matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from emerging_optimizers.lab.eigenbasis import EigenbasisResult
from emerging_optimizers.lab.palette import COLORS, DARK, MARKERS, styles
from emerging_optimizers.lab.precision import PRECISIONS, PrecisionResult, ways
from emerging_optimizers.lab.record import RunResult, SpikedRun, write_atomically
from emerging_optimizers.lab.report import baseline_loss
from emerging_optimizers.lab.spike import SpikeResult
from emerging_optimizers.lab.tf32 import TF32Result

# Lines of the variants of an optimizer in the spike experiment.
LINES: dict[str, Any] = {"": "-", "published": "--", "guarded": ":", "published-guarded": "-."}


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a figure of pyplot as a PNG file, atomically, and closes it.

    Args:
        figure: What was drawn.
        path: Where to.
        dpi: Pixels an inch.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi)
    plt.close(figure)
    write_atomically({path: content.getvalue()})


def plot_losses(results: Sequence[RunResult], path: Path) -> None:
    """Draws the loss over steps and over CPU seconds: held-out loss strong, training loss faint.

    Args:
        results: What each optimizer did with the job.
        path: The picture to write.
    """
    figure, (over_steps, over_seconds) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name, (color, marker) in styles([result.optimizer for result in results]).items():
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
    save_figure(figure, path, dpi=150)


def plot_training_spike(spiked: Sequence[SpikedRun], path: Path) -> None:
    """Draws training loss and update RMS around the spike: a column an optimizer; dark is the run without the spike.

    Args:
        spiked: The runs with the spike.
        path: The picture to write.
    """
    optimizers = list(dict.fromkeys(spiked_run.run.optimizer for spiked_run in spiked))
    figure, panels = plt.subplots(
        *(2, len(optimizers)),
        figsize=(1 + 4 * len(optimizers), 6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    at = spiked[0].spike_at
    for (losses, updates), optimizer in zip(panels.T, optimizers, strict=True):
        own = [spiked_run for spiked_run in spiked if spiked_run.run.optimizer == optimizer]
        lines: dict[str, tuple[RunResult, str]] = {"without the spike": (own[0].calm, DARK)}
        for spiked_run, color in zip(own, COLORS[1:], strict=False):
            guard = "no guard" if spiked_run.guard is None else f"spike_guard={spiked_run.guard:g}"
            lines[guard] = (spiked_run.run, color)
        for label, (run, color) in lines.items():
            shown = [step for step in run.steps if at - 20 < step.step <= at + 100]
            for axes, key in ((losses, "loss"), (updates, "update_rms")):
                values = [getattr(step, key) for step in shown]
                axes.plot([step.step for step in shown], values, label=label, color=color, linewidth=1)
        for axes in (losses, updates):
            axes.axvline(at + 1, color=DARK, alpha=0.15, linewidth=6, zorder=0)
        losses.set_title(optimizer)
        updates.set_yscale("log")
        first = optimizer == optimizers[0]
        _label(losses, "", "training loss, nats" if first else "")
        _label(updates, "step (grey: the spike)", "RMS of the update, whole model" if first else "")
    panels[0, -1].legend(frameon=False)
    save_figure(figure, path, dpi=150)


def plot_grid(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draws the final loss over the learning rate, a curve an optimizer, its best marked.

    Args:
        curves: Pairs of learning rate and final held-out loss for each optimizer, by rising rate.
        path: The picture to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (color, marker) in styles(list(curves)).items():
        points = [point for point in curves[name] if math.isfinite(point[1])]
        if not points:
            continue
        lr, loss = min(points, key=lambda point: point[1])
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4)
        axes.plot(lr, loss, color=color, marker=marker, markersize=10, label=f"{name}: {loss:.2f} at {lr:g}")
    axes.set_xscale("log")
    _label(axes, "learning rate", "final held-out loss, nats per character")
    axes.legend(frameon=False, title="best")
    save_figure(figure, path, dpi=150)


def plot_spike_warmup(result: SpikeResult, path: Path) -> None:
    """Draws the update RMS of each optimizer from its first step, without a spike.

    Args:
        result: The sweep.
        path: The picture to write.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for arm, style in zip(result.arms, _arm_styles(result), strict=True):
        rms = arm.no_spike.rms[: result.config.warmup_steps]
        axes.plot(range(1, len(rms) + 1), rms, **style)
    axes.set_yscale("log")
    _label(axes, "step", "update RMS")
    _spike_legend(figure, result)
    save_figure(figure, path, dpi=110)


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
                axes.plot(range(1, len(rms) + 1), rms, **style)
            axes.axvline(at + 1, color=DARK, linestyle=":", linewidth=1)
            axes.set_yscale("log")
            axes.set_title(f"×{scale:g} after {at} steps", fontsize="medium")
            axes.yaxis.set_minor_locator(NullLocator())  # in twelve panels half of the drawing's time
            _label(axes, "step" if at == times[-1] else "", "update RMS" if scale == sizes[0] else "")
    _spike_legend(figure, result)
    save_figure(figure, path, dpi=80)


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
        for arm, style in zip(result.arms, _arm_styles(result), strict=True):
            rows = [row for row in arm.rows if row.spike_at == at]
            axes.plot([row.spike_scale for row in rows], [row.aftershock for row in rows], marker=".", **style)
            before = {"linestyle": "none", "marker": "_", "markersize": 10, "alpha": 0.6}
            axes.plot(rows[0].spike_scale / 3, rows[0].before, **{**style, **before})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"spike after {at} steps", fontsize="medium")
        label = "largest update RMS after the spike (at the left: before)"
        _label(axes, "size of the spike", label if at == times[0] else "")
    _spike_legend(figure, result)
    save_figure(figure, path, dpi=110)


def plot_spike_spectra(result: SpikeResult, path: Path) -> None:
    """Draws the singular values of the updates around one spike, the middle one of the sweep: a panel a step.

    Args:
        result: The sweep.
        path: The picture to write.
    """
    config = result.config
    at = sorted(config.spike_at)[(len(config.spike_at) - 1) // 2]
    scale = sorted(config.spike_scale)[(len(config.spike_scale) - 1) // 2]
    steps = config.spectrum_steps_around(at)
    figure, (panels,) = plt.subplots(
        *(1, len(steps)), figsize=(1 + 3.7 * len(steps), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for step, axes in zip(steps, panels, strict=True):
        for arm, style in zip(result.arms, _arm_styles(result), strict=True):
            values = arm.trajectory((at, scale)).singular_values[step]
            axes.plot(range(1, len(values) + 1), values, **style)
        axes.set_yscale("log")
        axes.set_title(_when(step - at - 1), fontsize="medium")
        _label(axes, "index", f"singular value of the update (×{scale:g} after {at} steps)" if step == steps[0] else "")
    _spike_legend(figure, result)
    save_figure(figure, path, dpi=110)


def _when(shift: int) -> str:
    """A step as seen from the spike."""
    count = f"{abs(shift)} step{'s' * (abs(shift) > 1)}"
    return "the spike's step" if shift == 0 else f"{count} {'before' if shift < 0 else 'after'} the spike"


def _arm_styles(result: SpikeResult) -> list[dict[str, Any]]:
    """A colour for each optimizer, a line for each variant."""
    colors = styles([arm.arm.optimizer for arm in result.arms])
    return [
        {"color": colors[arm.arm.optimizer][0], "linestyle": LINES[arm.variant], "linewidth": 1.2}
        for arm in result.arms
    ]


def _spike_legend(figure: Figure, result: SpikeResult) -> None:
    """One entry for each colour and, beside them, each line: shorter than one for each arm."""
    colors = styles([arm.arm.optimizer for arm in result.arms])
    variants = sorted({arm.variant for arm in result.arms}, key=[*LINES].index)
    entries = [Line2D([], [], color=color, label=name) for name, (color, _) in colors.items()]
    if len(variants) > 1:
        names = {"": "default", "published": "published start"}
        entries += [Line2D([], [], color="grey", linestyle=LINES[v], label=names.get(v, v)) for v in variants]
    if figure.get_figwidth() > 1.3 * len(entries):
        figure.legend(handles=entries, loc="outside upper center", ncols=len(entries), frameon=False)
    else:
        figure.legend(handles=entries, loc="outside right center", frameon=False)


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
    style = styles(sorted({run.precision for run in result.runs}))
    steps = range(1, config.steps + 1)
    for (angles, updates), optimizer in zip(panels.T, config.optimizers, strict=True):
        for run in result.runs:
            if run.optimizer != optimizer:
                continue
            color = DARK if run.precision == "highest" else style[run.precision][0]
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
    save_figure(figure, path, dpi=100)


def plot_precision(result: PrecisionResult, path: Path) -> None:
    """Draws the errors over the spectrum's range: of the eigenvalues, and of the KL update, a panel a floor.

    The panels of the update show the first reduced precision, and float32 where it ran.

    Args:
        result: The measures.
        path: The picture to write.
    """
    config = result.config
    columns = 1 + len(config.relative_floors)
    figure, (panels,) = plt.subplots(
        *(1, columns), figsize=(1 + 4 * columns, 4.8), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    ranges = sorted(config.ranges)
    colors = dict(zip(PRECISIONS, (DARK, COLORS[0], COLORS[3]), strict=True))
    markers = dict(zip(PRECISIONS, MARKERS, strict=False))
    for name in config.precisions:
        rows, style = result.eigenvalues_at(name), {"color": colors[name], "marker": markers[name], "markersize": 4}
        panels[0].plot(ranges, [row.small_median for row in rows], label=f"{PRECISIONS[name]} ({name})", **style)
        panels[0].plot(ranges, [row.large_median for row in rows], linestyle=":", **style)
    panels[0].set_title("eigenvalues: smallest decade (dotted: largest)", fontsize="medium")

    reduced = [name for name in config.precisions if name != "highest"][:1]
    shown = (*reduced, *({"highest"} & set(config.precisions)))
    for axes, floor in zip(panels[1:], config.relative_floors, strict=True):
        for name, own, form in (way for precision in shown for way in ways(precision)):
            updates = result.updates_at(name, own, form, floor)
            axes.plot(
                ranges,
                [row.error for row in updates],
                color=DARK if name == "highest" else COLORS[1 if form == "published" else 2],
                linestyle="-" if own == name else "--",
                marker="o" if form == "published" else "s",
                markersize=4,
                label=f"{form}, {PRECISIONS[name]}" + ("" if own == name else f", Λ in {PRECISIONS[own]}"),
            )
            indefinite = [math.nan if row.positive else row.error for row in updates]
            axes.plot(ranges, indefinite, "x", color=DARK, markersize=8)
        axes.set_title(f"KL update, relative floor {floor:g}", fontsize="medium")
    panels[1].plot([], [], "x", color=DARK, markersize=8, label="not positive semi-definite")

    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="mask")
        axes.axhline(1, color=DARK, linewidth=1, alpha=0.4, zorder=0)
        _label(axes, "largest / smallest eigenvalue", "median relative error" if axes is panels[0] else "")
    for axes in panels[:2]:
        axes.legend(frameon=False, fontsize="small", loc="upper left")
    save_figure(figure, path, dpi=110)


def plot_tf32(result: TF32Result, path: Path) -> None:
    """Draws the final losses: a panel an optimizer, a pair of points joined by a line for each seed.

    Args:
        result: The runs.
        path: The picture to write.
    """
    optimizers = result.config.optimizers
    figure, (panels,) = plt.subplots(
        *(1, len(optimizers)),
        figsize=(1 + 4.2 * len(optimizers), 4.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, optimizer in zip(panels, optimizers, strict=True):
        rows = [row for row in result.rows if row.optimizer == optimizer]
        for k, row in enumerate(rows):
            color = COLORS[("published", "default").index(row.form)]
            for i, pair in enumerate(zip(row.float32, row.tf32, strict=True)):
                x = k + 0.12 * (i - (len(row.float32) - 1) / 2)
                axes.plot([x, x], pair, color=color, linewidth=1, alpha=0.6)
                for loss, marker in zip(pair, ("o", "x"), strict=True):
                    axes.plot(x, loss, marker=marker, color=color, markersize=6, fillstyle="none")
        axes.set_xticks(range(len(rows)), [f"{row.form}\n{'spike' if row.spike else 'no spike'}" for row in rows])
        axes.set_title(optimizer)
        _label(axes, "", "final held-out loss, nats per character" if axes is panels[0] else "")
    entries = [
        Line2D([], [], color=DARK, marker=marker, fillstyle="none", linestyle="", label=label)
        for marker, label in (("o", "float32"), ("x", "TF32"))
    ]
    panels[-1].legend(handles=entries, frameon=False, title="one seed a line")
    save_figure(figure, path, dpi=110)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
