"""The figure and the table of the learning-rate grid."""

import math
from collections.abc import Sequence

from emerging_optimizers.lab.palette import styles
from emerging_optimizers.lab.runs import GridRow, best_row
from emerging_optimizers.lab.views.describe import OWN, Curve, Figure, Key, Panel, Table, View, alone, number


def grid_view(rows: Sequence[GridRow], picture: str = "grid") -> View:
    """What `eopt grid` found."""
    runs: dict[str, list[GridRow]] = {}
    for row in rows:
        runs.setdefault(row.optimizer, []).append(row)
    figure = _figure(runs)
    keys = []
    for name, (color, mark) in styles(list(runs)).items():
        best = best_row(rows, name)
        keys.append(Key(name, color, mark=mark, note=f"{best.final_loss:.2f} at {best.arm.lr:g}"))
    return View(
        title="Learning rates", keys=keys, parts=(figure,), tables=(_table(runs),), pictures={picture: [[figure]]}
    )


def _figure(runs: dict[str, list[GridRow]]) -> Figure:
    """The final loss over the learning rate, a curve an optimizer, its best crossed."""
    curves = []
    for name, own in runs.items():
        finite = [row for row in own if math.isfinite(row.final_loss)]
        if finite:
            best = best_row(finite, name)
            rates, losses = [row.arm.lr or 0 for row in finite], [row.final_loss for row in finite]
            curves += [
                Curve(key=name, x=rates, y=losses, mark=OWN),
                Curve(key=name, x=[best.arm.lr or 0], y=[best.final_loss], dash="", mark="x"),
            ]
    return Figure(
        title="Final held-out loss over the learning rate (a cross: the best)",
        views=alone(Panel("", curves)),
        x="learning rate",
        y="nats per character",
        log="x",
    )


def _table(runs: dict[str, list[GridRow]]) -> Table:
    rows = []
    for name, own in runs.items():
        best = best_row(own, name)
        for row in own:
            at_edge = " at the edge of the grid" if row.arm.lr in (own[0].arm.lr, own[-1].arm.lr) else ""
            note = f"best{at_edge}" if row is best else ""
            rows.append(
                (
                    *(name, number(row.arm.lr, "g"), number(row.final_loss, ".4f")),
                    *(number(row.cpu_seconds, ".1f"), note),
                )
            )
    return Table(
        title="Final held-out loss over the learning rate",
        head=("optimizer", "lr", "final loss", "CPU s", ""),
        rows=rows,
        keys=[name for name, own in runs.items() for _ in own],
    )
