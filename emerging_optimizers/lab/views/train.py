"""The figures and tables of the training job: losses, cost, and how training comes back from a spike."""

import math
from collections.abc import Sequence

from emerging_optimizers.lab.measures import LOSS_TOLERANCE, TOLERANCE, baseline_loss, recovery, summary
from emerging_optimizers.lab.palette import COLORS, DARK, styles
from emerging_optimizers.lab.runs import RunResult, SpikedRun, TrainResult
from emerging_optimizers.lab.views.describe import (
    OWN,
    Cell,
    Curve,
    Figure,
    Key,
    Number,
    Panel,
    Table,
    View,
    alone,
    number,
)

CALM = "without the spike"


def train_view(result: TrainResult) -> View:
    """What `eopt train` found."""
    config, runs, spiked = result.config, result.runs, result.spiked
    by_step, by_second = (_losses(runs, *by) for by in (("step", "step"), ("CPU second", "cpu_s")))
    keys = [
        Key(run.optimizer, color, mark=mark, note=f"{run.final_loss:.2f} (lr {run.arm.lr:g})")
        for run, (color, mark) in zip(runs, styles([run.optimizer for run in runs]).values(), strict=True)
    ]
    parts: list[Figure | Table] = [by_step, by_second]
    tables = [comparison_table(runs)]
    pictures = {"loss": [[by_step, by_second]]}
    if spiked:
        figures = [
            _around_the_spike(spiked, "Training loss", "loss", y="nats per character"),
            _around_the_spike(spiked, "Update RMS", "update_rms", y="RMS over the whole model"),
        ]
        guards = dict.fromkeys(map(_guard, spiked))
        keys += [Key(name, color) for name, color in zip((CALM, *guards), (DARK, *COLORS[1:]), strict=False)]
        parts += figures
        tables.append(recovery_table(spiked))
        pictures["spike"] = [[figure] for figure in figures]
    return View(
        title=f"Training, {result.folder.name}",
        question="How fast does each optimizer train a small GPT on real text, by step and by CPU second?",
        facts=f"{runs[0].parameters:,} parameters, {config.steps} steps of {config.batch} windows of "
        f"{config.context} characters, seed {config.seed}. Losses are in nats per character.",
        keys=keys,
        parts=(*parts, *tables),
        tables=tables,
        pictures=pictures,
    )


def _losses(runs: Sequence[RunResult], what: str, coordinate: str) -> Figure:
    """Held-out loss, and training loss behind it. The axis leaves out what lies far above the first held-out loss."""
    curves = []
    for run in runs:
        x, loss = [getattr(step, coordinate) for step in run.steps], [step.loss for step in run.steps]
        held_out = [getattr(step, coordinate) for step, _ in run.evaluations]
        curves += [
            Curve(key=run.optimizer, x=x, y=loss, faint=True),
            Curve(key=run.optimizer, x=held_out, y=[loss for _, loss in run.evaluations], mark=OWN),
        ]
    target = baseline_loss(runs)
    first = (run.evaluations[0][1] for run in runs)
    return Figure(
        title=f"Held-out loss (faint: training) by {what}"
        + ("" if target is None else f"; dotted: AdamW’s best, {target:.2f}"),
        views=alone(Panel("", curves, levels=() if target is None else (target,))),
        x=what,
        y="loss, nats per character",
        limits=(None, 1.05 * max(filter(math.isfinite, first), default=1.0)),
    )


def _around_the_spike(spiked: Sequence[SpikedRun], what: str, of: str, y: str) -> Figure:
    """From 20 steps before the spike to 100 after it: a panel an optimizer."""
    at = spiked[0].spike_at
    panels = []
    for optimizer in dict.fromkeys(run.run.optimizer for run in spiked):
        own = [run for run in spiked if run.run.optimizer == optimizer]
        lines = {CALM: own[0].calm, **{_guard(run): run.run for run in own}}
        curves = []
        for key, run in lines.items():
            shown = [step for step in run.steps if at - 20 < step.step <= at + 100]
            curves.append(Curve(key=key, x=[step.step for step in shown], y=[getattr(step, of) for step in shown]))
        panels.append(Panel(optimizer, curves, lines=(at + 1,)))
    return Figure(
        title=f"{what} around the spike",
        views=alone(*panels),
        x="step",
        y=y,
        log="y" if of == "update_rms" else "",
        columns=len(panels),
    )


def _guard(run: SpikedRun) -> str:
    return "no guard" if run.guard is None else f"spike_guard={run.guard:g}"


def comparison_table(runs: Sequence[RunResult]) -> Table:
    """The closing table: losses, time, the optimizer's share of the CPU seconds, its state a parameter."""
    target = baseline_loss(runs)
    goal = "" if target is None else f"; the target is AdamW's best, {target:.3f}"
    columns = {
        "lr": ("lr", "g"),
        "final_loss": ("final\nloss", ".3f"),
        "best_loss": ("best\nloss", ".3f"),
        "steps_to_adamw": ("steps\nto it", ".0f"),
        "cpu_s_to_adamw": ("CPU s\nto it", ".0f"),
        "cpu_s": ("CPU s", ".1f"),
        "wall_s": ("wall s", ".1f"),
        "optimizer_share": ("in its\nstep", ".0%"),
        "state_bytes_per_parameter": ("bytes a\nweight", ".1f"),
    }
    return Table(
        title=f"Held-out loss, nats per character{goal}",
        head=("optimizer", *(heading for heading, _ in columns.values())),
        rows=[
            (row["optimizer"], *(number(row[key], form) for key, (_, form) in columns.items())) for row in summary(runs)
        ],
        keys=[run.optimizer for run in runs],
        dense=True,
    )


def recovery_table(spiked: Sequence[SpikedRun]) -> Table:
    """The table of the spike: what it did to the loss and to the updates, without and with the guard."""
    columns = {
        "loss_before": ("loss\nbefore", ".2f"),
        "worst_loss": ("worst\nloss", ".2f"),
        "worst_excess": ("most\nabove", ".2f"),
        "loss_back": ("loss\nback", "d"),
        "update_at_spike": ("update\nx, spike", ".2f"),
        "largest_update": ("most\nafter", ".2f"),
        "update_first_back": ("first\nback", "d"),
        "update_back": ("back\nfor good", "d"),
        "final_loss": ("final\nloss", ".2f"),
    }

    def cell(value: float | None, form: str, never: str) -> Cell:
        return number(value, form) if value is not None else (Number(None, never if form == "d" else "nan"),)

    rows = []
    for run, row in zip(spiked, recovery(spiked), strict=True):
        never = f">{len(run.run.steps) - run.spike_at - 1}"
        guard = "" if run.guard is None else f" guard {run.guard:g}"
        cells = (cell(row[key], form, never) for key, (_, form) in columns.items())
        rows.append((f"{run.run.optimizer}{guard}", *cells))
    return Table(
        title="After the spike, against the run without it. Back: the loss at most "
        f"{LOSS_TOLERANCE:g} nats above, for good; the update RMS within {TOLERANCE:.0%}, first / for good",
        head=("optimizer", *(heading for heading, _ in columns.values())),
        rows=rows,
        keys=[run.run.optimizer for run in spiked],
        dense=True,
    )
