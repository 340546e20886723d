"""The report of the lab: one HTML file with the tables and figures of every experiment under a folder.

A reader turns the files of one run into a `Section`, which is data; the template shows any section. The file is whole:
its content security policy forbids the browser to fetch anything.

The figures are plotly's. Its script makes the file 5 MB where bokeh's would make it 2, but its figures are SVG, which
print, scale and can be tested, one call (`Plotly.react`) serves selection, theme and width, and it brings one further
package where bokeh brings a web server. No package on PyPI carries one of its partial bundles.
"""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from emerging_optimizers.lab.config import TrainConfig, UsageError
from emerging_optimizers.lab.eigenbasis import EigenbasisResult
from emerging_optimizers.lab.palette import COLORS, DARK, styles
from emerging_optimizers.lab.precision import FORMS, PRECISIONS, PrecisionResult, UpdateRow
from emerging_optimizers.lab.record import RunResult, read_json, write_atomically
from emerging_optimizers.lab.report import summary
from emerging_optimizers.lab.spike import SpikeResult

# The line of each variant of an optimizer, by its name in plotly.
DASHES = {"": "solid", "published": "dash", "guarded": "dot", "published-guarded": "dashdot"}


@dataclass(frozen=True)
class Key:
    """One of the things that a section compares: a button that shows and hides its curves and rows."""

    name: str
    color: str
    dash: str = "solid"

    @property
    def paint(self) -> str:
        """The colour on the page, whose ink is light where the paper is dark."""
        return "currentColor" if self.color == DARK else self.color


@dataclass(frozen=True)
class Number:
    """A number of the result and how it is shown."""

    value: float | None
    text: str


Cell = str | tuple[Number, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells; a row belongs to a key, and a cell is a text or some numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a panel."""

    key: str
    y: Sequence[float]
    x: Sequence[float] | None = None
    """By default the steps from 1 on."""
    dash: str | None = None
    """By default the key's."""
    faint: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes, and the steps at which a vertical line stands."""

    title: str
    curves: Sequence[Curve]
    lines: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels with common axes. Each view is a set of panels, and the reader chooses among them."""

    title: str
    views: Mapping[str, Sequence[Panel]]
    x: str
    y: str
    log: str = ""
    """Which axes are logarithmic: "", "x", "y" or "xy"."""
    columns: int = 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """One experiment: what was asked, what came out, what it ran on."""

    id: str
    title: str
    question: str
    facts: str
    keys: Sequence[Key]
    parts: Sequence[Table | Figure]
    command: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """An experiment that the report knows."""

    command: str
    """What makes its result."""
    files: str
    """A pattern under the folder of runs: the file that a finished run leaves."""
    read: Callable[[Path], Section]


def write_report(runs: Path, out: Path) -> tuple[Section, ...]:
    """Writes the report of every finished run.

    Args:
        runs: The folder that holds the run folders.
        out: The HTML file; one that is there is replaced.

    Returns:
        The sections of the report.

    Raises:
        UsageError: There is no finished run, or a result that cannot be read. Nothing has been written then.

    Example:
        >>> from emerging_optimizers.lab.spike import SpikeConfig, run_spike, save_spike
        >>> config = SpikeConfig(optimizers=("muon",), shape=(4, 3), steps=12, spike_at=(5,), spike_scale=(10.0,))
        >>> files = save_spike(run_spike(config), Path("runs/spike"))
        >>> [section.title for section in write_report(Path("runs"), Path("runs/report.html"))]
        ['Gradient spikes']
    """
    found = {kind: sorted(runs.glob(kind.files)) for kind in KINDS}
    sections = tuple(_read(kind, path) for kind, paths in found.items() for path in paths)
    if not sections:
        commands = ", ".join(f"`{kind.command}`" for kind in KINDS)
        raise UsageError(f"there is no finished run under {runs}; one of {commands} makes one, or give another --runs")
    html = render(sections, [kind.command for kind, paths in found.items() if not paths])
    write_atomically(out, lambda file: file.write(html.encode()))
    return sections


def render(sections: Sequence[Section], missing: Sequence[str] = ()) -> str:
    """The report as HTML.

    Args:
        sections: What to show, in this order.
        missing: Commands of the experiments that have no result yet.
    """
    environment = Environment(
        loader=PackageLoader("emerging_optimizers.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["plot"] = _plot
    environment.tests["table"] = lambda part: isinstance(part, Table)
    template = environment.get_template("report.html.j2")
    return template.render(sections=sections, missing=missing, plotly=Markup(get_plotlyjs()))


def _read(kind: Kind, path: Path) -> Section:
    try:
        return kind.read(path)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); make it again with `{kind.command}`, "
            "or move it away"
        ) from error


# --- the experiments ------------------------------------------------------------------------------------


def _spike(path: Path) -> Section:
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


def _eigenbasis(path: Path) -> Section:
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


def _precision(path: Path) -> Section:
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


def _train(path: Path) -> Section:
    folder = path.parent
    config = TrainConfig.from_json(read_json(folder / "config.json")["config"])
    results = [RunResult.from_json(read_json(folder / name / "result.json")) for name in config.optimizers]
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
        ],
        command=_command("train", config),
        environment=_environment(path),
    )


KINDS = (
    Kind("eopt spike", "spike*/result.json", _spike),
    Kind("eopt eigenbasis", "eigenbasis*/result.json", _eigenbasis),
    Kind("eopt precision", "precision*/result.json", _precision),
    Kind("eopt train", "*/summary.json", _train),
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


def _plot(figure: Figure, keys: Sequence[Key]) -> dict[str, Any]:
    """A figure as the page's script takes it: curves with their styles, ranges over all views."""
    style = {key.name: key for key in keys}
    curves = [curve for panels in figure.views.values() for panel in panels for curve in panel.curves]
    xs = [x for curve in curves for x in (curve.x or (1, len(curve.y)))]
    ys = [y for curve in curves for y in curve.y]
    return {
        "x": {"title": figure.x, **_axis(xs, "x" in figure.log)},
        "y": {"title": figure.y, **_axis(ys, "y" in figure.log)},
        "views": {
            name: [
                {
                    "title": panel.title,
                    "lines": list(panel.lines),
                    "curves": [
                        {
                            "key": curve.key,
                            "color": style[curve.key].paint,
                            "dash": curve.dash or style[curve.key].dash,
                            "faint": curve.faint,
                            "marked": curve.marked,
                            "x": None if curve.x is None else list(curve.x),
                            "y": [y if math.isfinite(y) else None for y in curve.y],
                        }
                        for curve in panel.curves
                    ],
                }
                for panel in panels
            ]
            for name, panels in figure.views.items()
        },
    }


def _axis(values: Iterable[float], log: bool) -> dict[str, Any]:
    """Type and range of an axis that all panels and views share; the range of a logarithmic one is in powers of ten."""
    fit = [math.log10(x) if log else x for x in values if math.isfinite(x) and not (log and x <= 0)] or [0.0]
    room = 0.03 * (max(fit) - min(fit)) or 0.5
    return {"type": "log" if log else "linear", "range": [min(fit) - room, max(fit) + room]}
