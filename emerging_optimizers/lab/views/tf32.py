"""The figures and tables of the experiment on training in TF32."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from emerging_optimizers.lab.palette import COLORS, DARK
from emerging_optimizers.lab.tf32 import PRECISIONS, TF32Result, TF32Row
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

LOSS = "nats per character"


def tf32_view(result: TF32Result) -> View:
    """What `eopt tf32` found."""
    config = result.config
    final = _final_losses(result)
    return View(
        title="Training in TF32",
        question="Does the precision of float32 products change how well SOAP trains, with and without a spike?",
        facts=f"The training job of `eopt train`, {config.steps} steps, seeds {', '.join(map(str, config.seeds))}; the "
        f"spike of ×{config.spike_scale:,g} comes after {config.spike_at} steps. Losses are in nats per character.",
        keys=[
            Key(precision, color, mark=mark)
            for precision, color, mark in zip(PRECISIONS, (DARK, COLORS[0]), ("o", "x"), strict=True)
        ],
        parts=(_losses(result), final, _seed_table(result)),
        tables=(_difference_table(result),),
        pictures={"tf32": [[final]]},
    )


def _losses(result: TF32Result) -> Figure:
    """The held-out loss over the steps: a view a seed."""
    config = result.config
    losses = {run.key: run.losses for run in result.runs}

    def panel(row: TF32Row, seed: int) -> Panel:
        found = [(p, losses[row.optimizer, row.form, row.spike, seed, p]) for p in PRECISIONS]
        return Panel(
            f"{row.optimizer}, {row.form}, spike: {_spike(result, row)}",
            [Curve(key=precision, x=[*map(int, loss)], y=[*loss.values()]) for precision, loss in found],
            lines=(config.spike_at + 1,) if row.spike else (),
        )

    return Figure(
        title="Held-out loss",
        views={f"seed {seed}": [panel(row, seed) for row in result.rows] for seed in config.seeds},
        x="step",
        y=LOSS,
        columns=4,
    )


def _final_losses(result: TF32Result) -> Figure:
    """A panel an optimizer; for each seed a pair of points that a line joins."""
    ticks: dict[float, str] = {}
    panels = []
    for optimizer in result.config.optimizers:
        rows = [row for row in result.rows if row.optimizer == optimizer]
        ticks |= {k: f"{row.form}\n{'spike' if row.spike else 'no spike'}" for k, row in enumerate(rows)}
        seeds = len(result.config.seeds)
        x = [k + 0.12 * (i - (seeds - 1) / 2) for k in range(len(rows)) for i in range(seeds)]
        exact, rounded = ([loss for row in rows for loss in getattr(row, p)] for p in PRECISIONS)
        joined = [loss for pair in zip(exact, rounded, strict=True) for loss in (*pair, math.nan)]
        panels.append(
            Panel(
                optimizer,
                [
                    Curve(key=PRECISIONS[1], x=[place for place in x for _ in range(3)], y=joined, faint=True),
                    Curve(key=PRECISIONS[0], x=x, y=exact, dash="", mark=OWN),
                    Curve(key=PRECISIONS[1], x=x, y=rounded, dash="", mark=OWN),
                ],
            )
        )
    return Figure(
        title="Final held-out loss, one seed a line",
        views=alone(*panels),
        x="",
        y=LOSS,
        columns=len(panels),
        ticks=ticks,
    )


def _difference_table(result: TF32Result) -> Table:
    """Final losses at both precisions, and how far apart they are beside how far apart the seeds are."""

    def spread(values: Sequence[float]) -> Cell:
        return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

    return Table(
        title="Final held-out loss, mean ± standard deviation over the seeds; TF32 less float32, seed by seed",
        head=("optimizer", "form", "spike", "float32", "TF32", "TF32 less float32"),
        rows=[
            (
                *(row.optimizer, row.form, f"x{result.config.spike_scale:g}" if row.spike else "none"),
                *(spread(row.float32), spread(row.tf32)),
                tuple(Number(x, f"{x:+.3f}") for x in row.differences),
            )
            for row in result.rows
        ],
        labels=3,
        between="  ",
    )


def _seed_table(result: TF32Result) -> Table:
    """The losses behind it, which belong to one precision each."""
    rows: list[tuple[str, tuple[Cell, ...]]] = [
        (precision, (precision, row.optimizer, row.form, _spike(result, row), *(number(x, ".3f") for x in values)))
        for row in result.rows
        for precision, values in zip(PRECISIONS, (row.float32, row.tf32), strict=True)
    ]
    return Table(
        title="Final held-out loss, seed by seed",
        head=("precision", "optimizer", "form", "spike", *(f"seed {seed}" for seed in result.config.seeds)),
        rows=[cells for _, cells in rows],
        keys=[precision for precision, _ in rows],
        labels=4,
    )


def _spike(result: TF32Result, row: TF32Row) -> str:
    return f"×{result.config.spike_scale:,g}" if row.spike else "none"
