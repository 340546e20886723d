"""The sections of the report: a reader for each experiment turns the files of one run into what the page shows."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.eigenbasis import EigenbasisResult
from emerging_optimizers.lab.page import Cell, Curve, Figure, Key, Number, Panel, Section, Table
from emerging_optimizers.lab.palette import COLORS, DARK, styles
from emerging_optimizers.lab.precision import FORMS, PRECISIONS, PrecisionResult, UpdateRow
from emerging_optimizers.lab.record import RunFolder, read_json
from emerging_optimizers.lab.report import summary
from emerging_optimizers.lab.spike import SpikeResult
from emerging_optimizers.lab.tf32 import PRECISIONS as PRECISIONS_TF32
from emerging_optimizers.lab.tf32 import TF32Result, TF32Row

# The line of each variant of an optimizer, by its name in plotly.
DASHES = {"": "solid", "published": "dash", "guarded": "dot", "published-guarded": "dashdot"}


def spike_section(path: Path) -> Section:
    """What `eopt spike` found."""
    result = SpikeResult.from_json(read_json(path))
    config = result.config
    times, sizes = sorted(config.spike_at), sorted(config.spike_scale)
    colors = styles([arm.arm.optimizer for arm in result.arms])
    keys = [Key(arm.name, colors[arm.arm.optimizer][0], DASHES[arm.variant]) for arm in result.arms]
    warmup = [Curve(key=arm.name, y=arm.no_spike.rms[: config.warmup_steps]) for arm in result.arms]
    sweep = [
        Panel(
            f"×{scale:,g} after {at} steps",
            [Curve(key=arm.name, y=arm.trajectory((at, scale)).rms) for arm in result.arms],
            lines=(at + 1,),
        )
        for at in times
        for scale in sizes
    ]
    aftershock = [
        Panel(
            f"Spike after {at} steps",
            [
                curve
                for arm in result.arms
                for rows in [[row for row in arm.rows if row.spike_at == at]]
                for curve in (
                    Curve(key=arm.name, x=sizes, y=[row.aftershock for row in rows], marked=True),
                    Curve(key=arm.name, x=sizes, y=[row.before for row in rows], dash="dot", faint=True),
                )
            ],
        )
        for at in times
    ]
    spectra = {
        f"×{scale:,g} after {at} steps": [
            Panel(
                f"Step {step}",
                [Curve(key=arm.name, y=arm.trajectory((at, scale)).singular_values[step]) for arm in result.arms],
            )
            for step in config.spectrum_steps_around(at)
        ]
        for at in times
        for scale in sizes
    }

    def table(title: str, edge: Sequence[str], cells: Callable[[Any], Cell], before: Any = None) -> Table:
        return Table(
            title,
            ("optimizer", "spike after", *edge, *(f"×{scale:,g}" for scale in sizes)),
            [
                (arm.name, (arm.name, _value(at, "d"), *([before(rows[0])] if before else []), *map(cells, rows)))
                for arm in result.arms
                for at in times
                for rows in [[row for row in arm.rows if row.spike_at == at]]
            ],
        )

    def steps(count: int | None, at: int) -> Number:
        return Number(count, f">{config.steps - at - 1}" if count is None else str(count))

    return Section(
        id=path.parent.name,
        title="Gradient spikes",
        question="How does each optimizer answer one gradient that is far too large: how long until its updates are "
        "back at their usual size, and how large do they get on the way?",
        facts=f"{len(keys)} optimizers, a {config.shape[0]} × {config.shape[1]} matrix with i.i.d. Gaussian gradients, "
        f"{config.steps} steps, learning rate 1, seed {config.seed}.",
        keys=keys,
        parts=[
            Figure(
                title="Update RMS without a spike", views={"": [Panel("", warmup)]}, x="step", y="update RMS", log="y"
            ),
            Figure(
                title="Update RMS around each spike",
                views={"": sweep},
                x="step",
                y="update RMS",
                log="y",
                columns=len(sizes),
            ),
            table(
                "Steps after the spike until the update RMS first / for good is within 10 % of its steady state",
                (),
                lambda row: (steps(row.recovery, row.spike_at), steps(row.settled, row.spike_at)),
            ),
            Figure(
                title="Aftershock: largest update RMS after the spike’s own step (dotted: before it)",
                views={"": aftershock},
                x="size of the spike",
                y="update RMS",
                log="xy",
                columns=len(times),
            ),
            table(
                "Largest update RMS after the spike’s own step; before: in the 30 steps before it",
                ("before",),
                lambda row: _value(row.aftershock),
                lambda row: _value(row.before),
            ),
            Figure(
                title="Singular values of the update around a spike",
                views=spectra,
                x="index",
                y="singular value",
                log="y",
                columns=3,
            ),
        ],
        command=_command("spike", config),
        environment=_environment(path),
    )


def eigenbasis_section(path: Path) -> Section:
    """What `eopt eigenbasis` found."""
    result = EigenbasisResult.from_json(read_json(path))
    config = result.config
    precisions = list(dict.fromkeys(run.precision for run in result.runs))
    colors = styles(sorted(precisions))
    keys = [
        Key(precision, DARK if precision == "highest" else colors[precision][0]) for precision in sorted(precisions)
    ]
    spike = (config.spike_at + 1,)
    angles, updates = (
        [
            Panel(
                optimizer,
                [curve for run in result.runs if run.optimizer == optimizer for curve in curves(run)],
                lines=spike,
            )
            for optimizer in config.optimizers
        ]
        for curves in (
            lambda run: (
                Curve(key=run.precision, y=run.topk_left),
                Curve(key=run.precision, y=run.topk_right, dash="dot"),
            ),
            lambda run: (Curve(key=run.precision, y=run.update_rms),),
        )
    )
    shifts = [
        (f"{n} {side}", sign * n) for n in sorted(config.offsets) for side, sign in (("before", -1), ("after", 1))
    ]
    return Section(
        id=path.parent.name,
        title="Eigenbases in reduced precision",
        question="What does a gradient spike do to SOAP’s eigenbases, and what has the precision of float32 products "
        "to do with it?",
        facts=f"A {config.shape[0]} × {config.shape[1]} matrix with i.i.d. Gaussian gradients, {config.steps} steps, a "
        f"spike of ×{config.spike_scale:,g} after {config.spike_at}; start “{config.start}”, refresh "
        f"of the bases at “{config.qr_precision}”, seed {config.seed}.",
        keys=keys,
        parts=[
            Figure(
                title=f"Degrees from the basis of step {config.spike_at}, first {config.top} columns (dotted: Q_R)",
                views={"": angles},
                x="step",
                y="degrees",
                columns=len(config.optimizers),
            ),
            Figure(
                title="Update RMS",
                views={"": updates},
                x="step",
                y="update RMS",
                log="y",
                columns=len(config.optimizers),
            ),
            Table(
                "Largest relative difference from “highest”, all steps",
                ("optimizer", "precision", "update RMS", "top eigenvalues of L"),
                [
                    (row.precision, (row.optimizer, row.precision, _value(row.update_rms), _value(row.eigenvalues)))
                    for row in result.agreement
                ],
            ),
            Table(
                f"Degrees from the basis of step {config.spike_at}, first column / first {config.top}, steps before or "
                "after it",
                ("optimizer", "precision", "basis", *(heading for heading, _ in shifts)),
                [
                    (
                        run.precision,
                        (
                            run.optimizer,
                            run.precision,
                            basis,
                            *(
                                _value(top1[config.spike_at - 1 + n], ".2f")
                                + _value(topk[config.spike_at - 1 + n], ".2f")
                                for _, n in shifts
                            ),
                        ),
                    )
                    for run in result.runs
                    for basis, top1, topk in (
                        ("Q_L", run.top1_left, run.topk_left),
                        ("Q_R", run.top1_right, run.topk_right),
                    )
                ],
            ),
        ],
        command=_command("eigenbasis", config),
        environment=_environment(path),
    )


def precision_section(path: Path) -> Section:
    """What `eopt precision` found."""
    result = PrecisionResult.from_json(read_json(path))
    config = result.config
    ranges = sorted(config.ranges)
    floors = config.relative_floors
    colors = dict(zip(PRECISIONS, (DARK, *COLORS), strict=False))
    # The ways of one panel: the form of the update, and whether the eigenvalues are at "highest" whatever the rest is.
    panels = [(floor, form, exact) for floor in floors for exact in (False, True) for form in FORMS]

    def updates(precision: str, floor: float, form: str, exact: bool) -> Sequence[UpdateRow]:
        return result.updates_at(precision, "highest" if exact else precision, form, floor)

    def name(floor: float, form: str, exact: bool) -> str:
        return f"{form}{', exact Λ' if exact else ''}, floor {floor:g}"

    measures = {
        "large_median": ("largest decade, median", ".1e"),
        "large_worst": ("largest decade, worst", ".1e"),
        "small_median": ("smallest decade, median", ".1e"),
        "small_worst": ("smallest decade, worst", ".1e"),
        "of_largest": ("worst, as a share of the largest value", ".1e"),
        "negative": ("below zero", ".0%"),
    }
    return Section(
        id=path.parent.name,
        title="Eigenvalues and KL updates in reduced precision",
        question="What do reduced float32 matrix products do to the eigenvalues of a factor and to the update that "
        "divides by them?",
        facts=f"{config.draws} factors with random bases and {config.shape[0]} × {config.shape[1]} gradients "
        f"(“{config.gradient}”), the eigenvalues falling evenly in their logarithm; seed {config.seed}. "
        + ", ".join(f"“{precision}” is {PRECISIONS[precision]}" for precision in config.precisions)
        + ".",
        keys=[Key(precision, colors[precision]) for precision in config.precisions],
        parts=[
            Figure(
                title="Relative error of the eigenvalues diag(QᵀKQ), median within a factor of 10 of the smallest "
                "(dotted: of the largest)",
                views={
                    "": [
                        Panel(
                            "",
                            [
                                Curve(
                                    key=precision,
                                    x=ranges,
                                    y=[getattr(row, of) for row in rows],
                                    dash=dash,
                                    marked=True,
                                )
                                for precision in config.precisions
                                for rows in [result.eigenvalues_at(precision)]
                                for of, dash in (("small_median", "solid"), ("large_median", "dot"))
                            ],
                        )
                    ]
                },
                x="largest / smallest eigenvalue",
                y="relative error",
                log="xy",
            ),
            Figure(
                title="Relative error of the KL update, median (exact Λ: eigenvalues at “highest”)",
                views={
                    "": [
                        Panel(
                            name(*panel),
                            [
                                Curve(key=precision, x=ranges, y=[row.error for row in rows], marked=True)
                                for precision in config.precisions
                                for rows in [updates(precision, *panel)]
                            ],
                        )
                        for panel in panels
                    ]
                },
                x="largest / smallest eigenvalue",
                y="relative error",
                log="xy",
                columns=len(panels) // len(floors),
            ),
            Table(
                "Relative error of the eigenvalues, by largest / smallest eigenvalue",
                ("precision", "measure", *(f"{x:g}" for x in ranges)),
                [
                    (precision, (precision, heading, *(_value(getattr(row, of), form) for row in rows)))
                    for precision in config.precisions
                    for rows in [result.eigenvalues_at(precision)]
                    for of, (heading, form) in measures.items()
                ],
            ),
            Table(
                "Median relative error of the KL update, by largest / smallest eigenvalue (*: not positive)",
                ("precision", "update", *(f"{x:g}" for x in ranges)),
                [
                    (
                        precision,
                        (
                            precision,
                            name(*panel),
                            *(_value(row.error, ".1e", mark="" if row.positive else "*") for row in rows),
                        ),
                    )
                    for precision in config.precisions
                    for panel in panels
                    if not (precision == "highest" and panel[2])
                    for rows in [updates(precision, *panel)]
                ],
            ),
            Table(
                "Largest asymmetry of the published KL update, by largest / smallest eigenvalue",
                ("precision", "floor", *(f"{x:g}" for x in ranges)),
                [
                    (precision, (precision, f"{floor:g}", *(_value(row.asymmetry, ".1e") for row in rows)))
                    for precision in config.precisions
                    for floor in floors
                    for rows in [updates(precision, floor, "published", False)]
                ],
            ),
        ],
        command=_command("precision", config),
        environment=_environment(path),
    )


def tf32_section(path: Path) -> Section:
    """What `eopt tf32` found."""
    result = TF32Result.from_json(read_json(path))
    config = result.config
    keys = [Key(precision, color) for precision, color in zip(PRECISIONS_TF32, (DARK, COLORS[0]), strict=True)]
    losses = {run.key: run.losses for run in result.runs}

    def spike(row: TF32Row) -> str:
        return f"×{config.spike_scale:,g}" if row.spike else "none"

    return Section(
        id=path.parent.name,
        title="Training in TF32",
        question="Does the precision of float32 products change how well SOAP trains, with and without a spike?",
        facts=f"The training job of `eopt train`, {config.steps} steps, seeds {', '.join(map(str, config.seeds))}; the "
        f"spike of ×{config.spike_scale:,g} comes after {config.spike_at} steps. Losses are in nats per character.",
        keys=keys,
        parts=[
            Figure(
                title="Held-out loss",
                views={
                    f"seed {seed}": [
                        Panel(
                            f"{row.optimizer}, {row.form}, spike: {spike(row)}",
                            [
                                Curve(key=precision, x=[*map(int, loss)], y=[*loss.values()])
                                for precision in PRECISIONS_TF32
                                for loss in [losses[row.optimizer, row.form, row.spike, seed, precision]]
                            ],
                            lines=(config.spike_at + 1,) if row.spike else (),
                        )
                        for row in result.rows
                    ]
                    for seed in config.seeds
                },
                x="step",
                y="nats per character",
                columns=4,
            ),
            Table(
                "Final held-out loss, seed by seed",
                ("precision", "optimizer", "form", "spike", *(f"seed {seed}" for seed in config.seeds)),
                [
                    (precision, (precision, row.optimizer, row.form, spike(row), *(_value(x, ".3f") for x in values)))
                    for row in result.rows
                    for precision, values in zip(PRECISIONS_TF32, (row.float32, row.tf32), strict=True)
                ],
            ),
        ],
        command=_command("tf32", config),
        environment=_environment(path),
    )


def train_section(path: Path) -> Section:
    """What `eopt train` found."""
    folder = path.parent
    config = TrainConfig.from_json(read_json(folder / "config.json")["config"])
    results = [RunFolder(folder / name).finished(name, config.steps) for name in config.optimizers]
    keys = [Key(name, color) for name, (color, _) in styles(config.optimizers).items()]

    def curves(coordinate: str) -> list[Curve]:
        return [
            curve
            for run in results
            for curve in (
                Curve(
                    key=run.optimizer,
                    x=[getattr(step, coordinate) for step in run.steps],
                    y=[step.loss for step in run.steps],
                    faint=True,
                ),
                Curve(
                    key=run.optimizer,
                    x=[getattr(step, coordinate) for step, _ in run.evaluations],
                    y=[loss for _, loss in run.evaluations],
                    marked=True,
                ),
            )
        ]

    columns = {
        "lr": ("learning rate", "g"),
        "final_loss": ("final loss", ".3f"),
        "best_loss": ("best loss", ".3f"),
        "steps_to_adamw": ("steps to AdamW’s best", "d"),
        "cpu_s_to_adamw": ("CPU s to AdamW’s best", ".1f"),
        "cpu_s": ("CPU s", ".1f"),
        "wall_s": ("wall s", ".1f"),
        "optimizer_share": ("in its step", ".0%"),
        "state_bytes_per_parameter": ("bytes a weight", ".1f"),
    }
    loss = "loss, nats per character"
    return Section(
        id=folder.name,
        title=f"Training, {folder.name}",
        question="How fast does each optimizer train a small GPT on real text, by step and by CPU second?",
        facts=f"{results[0].parameters:,} parameters, {config.steps} steps of {config.batch} windows of "
        f"{config.context} characters, seed {config.seed}. Losses are in nats per character.",
        keys=keys,
        parts=[
            Figure(
                title=f"Held-out loss (faint: training) by {what}",
                views={"": [Panel("", curves(coordinate))]},
                x=what,
                y=loss,
            )
            for what, coordinate in (("step", "step"), ("CPU second", "cpu_s"))
        ]
        + [
            Table(
                "Held-out loss and cost",
                ("optimizer", *(heading for heading, _ in columns.values())),
                [
                    (
                        row["optimizer"],
                        (row["optimizer"], *(_value(row[column], form) for column, (_, form) in columns.items())),
                    )
                    for row in summary(results)
                ],
            )
        ]
        + [_recovery(file) for file in [folder / "spike.json"] if config.spike is not None],
        command=_command("train", config),
        environment=_environment(path),
    )


def _recovery(file: Path) -> Table:
    """How training came back from the spike of `eopt train --spike-at`."""
    columns = {
        "guard": ("guard", "g"),
        "worst_excess": ("most above", ".2f"),
        "loss_back": ("steps to the loss", "d"),
        "largest_update": ("largest update", ".2f"),
        "update_back": ("steps to the update", "d"),
        "final_loss": ("final loss", ".3f"),
        "final_loss_without_spike": ("without spike", ".3f"),
    }
    return Table(
        "After the spike, against the run without it: loss in nats above, update RMS as a multiple, steps until either "
        "is back for good",
        ("optimizer", *(heading for heading, _ in columns.values())),
        [
            (
                row["optimizer"],
                (row["optimizer"], *(_value(row[column], form) for column, (_, form) in columns.items())),
            )
            for row in read_json(file)
        ],
    )


# --- from results to what the page shows ----------------------------------------------------------------


def _command(name: str, config: Any) -> str:
    """The command line that asks for a configuration again."""
    default = type(config)()
    words = ["eopt", name]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        match value:
            case Mapping():
                given = [",".join(f"{key}={x:g}" for key, x in value.items())]
            case tuple() if all(isinstance(x, str) for x in value):
                given = [",".join(value)]
            case tuple():
                given = [str(x) for x in value]
            case _:
                given = [str(value)]
        words += [f"--{field.name.replace('_', '-')}", *given]
    return shlex.join(words)


def _environment(path: Path) -> dict[str, str]:
    """What stands beside a result about where it comes from, as texts."""

    def text(value: Any) -> str:
        match value:
            case Mapping():
                return ", ".join(f"{key} {x}" for key, x in value.items())
            case list():
                return shlex.join(value)
            case _:
                return str(value)

    stored = read_json(path.with_name("environment.json"))
    return {name.replace("_", " "): text(value) for name, value in stored.items()}


def _value(value: float | None, form: str = "#.3g", mark: str = "") -> tuple[Number, ...]:
    """A number with some of its digits; the page has all of them in the cell's title."""
    if value is None or not math.isfinite(value):
        return (Number(None, "–"),)
    return (Number(value, f"{value:{form}}".rstrip(".") + mark),)
