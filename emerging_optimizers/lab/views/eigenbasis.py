"""The figures and tables of the eigenbasis experiment."""

from collections.abc import Callable, Sequence

from emerging_optimizers.lab.eigenbasis import EigenbasisConfig, EigenbasisResult, EigenbasisRun
from emerging_optimizers.lab.palette import DARK, styles
from emerging_optimizers.lab.views.describe import Cell, Curve, Figure, Key, Panel, Table, View, alone, number

# The eigenvalues that a table shows.
SHOWN = (0, 1, 4, 9)


def eigenbasis_view(result: EigenbasisResult) -> View:
    """What `eopt eigenbasis` found."""
    config = result.config
    colors = styles(sorted({run.precision for run in result.runs}))
    angles, updates = _figures(result)
    turned = [_angle_table(config, run) for run in result.runs]
    agreement = [_agreement_table(result)] if result.agreement else []
    return View(
        title="Eigenbases in reduced precision",
        question="What does a gradient spike do to SOAP’s eigenbases, and what has the precision of float32 products "
        "to do with it?",
        facts=f"A {config.shape[0]} × {config.shape[1]} matrix with i.i.d. Gaussian gradients, {config.steps} steps, a "
        f"spike of ×{config.spike_scale:,g} after {config.spike_at}; start “{config.start}”, refresh "
        f"of the bases at “{config.qr_precision}”, seed {config.seed}.",
        keys=[Key(precision, DARK if precision == "highest" else color) for precision, (color, _) in colors.items()],
        parts=(angles, updates, *agreement, *turned),
        tables=(*turned, *(_eigenvalue_table(config, run) for run in result.runs), *agreement),
        pictures={"eigenbasis": [[angles], [updates]]},
    )


def _figures(result: EigenbasisResult) -> tuple[Figure, Figure]:
    """Angles and updates over the steps, a panel an optimizer."""
    config = result.config

    def panels(curves: Callable[[EigenbasisRun], Sequence[Curve]]) -> list[Panel]:
        return [
            Panel(
                optimizer,
                [curve for run in result.runs if run.optimizer == optimizer for curve in curves(run)],
                lines=(config.spike_at + 1,),
            )
            for optimizer in config.optimizers
        ]

    angles = panels(
        lambda run: (
            Curve(key=run.precision, y=run.topk_left),
            Curve(key=run.precision, y=run.topk_right, dash="dot"),
        )
    )
    updates = panels(lambda run: (Curve(key=run.precision, y=run.update_rms),))
    return (
        Figure(
            title=f"Degrees from the basis of step {config.spike_at}, first {config.top} columns (dotted: Q_R)",
            views=alone(*angles),
            x="step",
            y="degrees",
            columns=len(angles),
            limits=(-3, 93),
        ),
        Figure(title="Update RMS", views=alone(*updates), x="step", y="update RMS", log="y", columns=len(updates)),
    )


def _angle_table(config: EigenbasisConfig, run: EigenbasisRun) -> Table:
    last = config.spike_at - 1
    return Table(
        title=f"{run.optimizer} at {run.precision!r}: degrees from the basis of step {config.spike_at}, "
        f"top-1 / top-{config.top}",
        head=("N", "Q_L, N before", "Q_L, N after", "Q_R, N before", "Q_R, N after"),
        rows=[
            (
                number(n, "d"),
                *(
                    number(top1[last + shift], ".2f") + number(topk[last + shift], ".2f")
                    for top1, topk in ((run.top1_left, run.topk_left), (run.top1_right, run.topk_right))
                    for shift in (-n, n)
                ),
            )
            for n in config.offsets
        ],
        keys=[run.precision] * len(config.offsets),
        labels=0,
    )


def _eigenvalue_table(config: EigenbasisConfig, run: EigenbasisRun) -> Table:
    shown = [i for i in SHOWN if i < config.shape[0]]
    around = (config.spike_at + shift for shift in (-4, 0, 1, 2, 5, 10, 20))
    rows: list[tuple[Cell, ...]] = []
    for step in (step for step in around if 1 <= step <= config.steps):
        values = run.eigenvalues[step - 1]
        ratio = values[0] / values[1] if len(values) > 1 and values[1] else None
        mark = " (spike)" if step == config.spike_at + 1 else ""
        rows.append((f"{step}{mark}", *(number(values[i], ".4g") for i in shown), number(ratio, ".4f")))
    return Table(
        title=f"{run.optimizer} at {run.precision!r}: largest eigenvalues of L",
        head=("step", *(f"eig[{i}]" for i in shown), "top/2nd"),
        rows=rows,
        keys=[run.precision] * len(rows),
    )


def _agreement_table(result: EigenbasisResult) -> Table:
    return Table(
        title='Largest relative difference from "highest", all steps',
        head=("optimizer", "precision", "update RMS", "top eigenvalues of L"),
        rows=[
            (row.optimizer, row.precision, number(row.update_rms, ".3g"), number(row.eigenvalues, ".3g"))
            for row in result.agreement
        ],
        keys=[row.precision for row in result.agreement],
        labels=2,
    )
