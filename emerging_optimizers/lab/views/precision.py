"""The figures and tables of the precision experiment."""

import math
from collections.abc import Sequence
from itertools import product

from emerging_optimizers.lab.forms import FORMS, ways
from emerging_optimizers.lab.palette import COLORS, DARK, MARKERS
from emerging_optimizers.lab.precision import PRECISIONS, EigenvalueRow, PrecisionResult, UpdateRow
from emerging_optimizers.lab.views.describe import OWN, Cell, Curve, Figure, Key, Number, Panel, Table, View, alone

# Rows of the table of eigenvalues, short enough for 80 characters.
EIGENVALUE_MEASURES = {
    "largest median": "large_median",
    "largest worst": "large_worst",
    "smallest median": "small_median",
    "smallest worst": "small_worst",
    "of the largest": "of_largest",
}
RANGE = "largest / smallest eigenvalue"


def precision_view(result: PrecisionResult) -> View:
    """What `eopt precision` found."""
    config = result.config
    looks = dict(zip(PRECISIONS, zip((DARK, *COLORS), MARKERS, strict=False), strict=False))
    figures = _eigenvalue_figure(result), _update_figure(result)
    tables = (
        *(_eigenvalue_table(result, precision) for precision in config.precisions),
        *(_update_table(result, *at) for at in product(config.relative_floors, config.precisions)),
        _asymmetry_table(result),
    )
    return View(
        title="Eigenvalues and KL updates in reduced precision",
        question="What do reduced float32 matrix products do to the eigenvalues of a factor and to the update that "
        "divides by them?",
        facts=f"{config.draws} factors with random bases and {config.shape[0]} × {config.shape[1]} gradients "
        f"(“{config.gradient}”), the eigenvalues falling evenly in their logarithm; seed {config.seed}. "
        + ", ".join(f"“{precision}” is {PRECISIONS[precision]}" for precision in config.precisions)
        + ".",
        keys=[
            Key(precision, color, mark=mark, note=PRECISIONS[precision])
            for precision, (color, mark) in looks.items()
            if precision in config.precisions
        ],
        parts=(*figures, *tables),
        tables=tables,
        pictures={"precision": [[figure] for figure in figures]},
    )


def _eigenvalue_figure(result: PrecisionResult) -> Figure:
    ranges = sorted(result.config.ranges)
    curves = [
        Curve(key=precision, x=ranges, y=[getattr(row, of) for row in rows], dash=dash, mark=OWN)
        for precision in result.config.precisions
        for rows in [result.eigenvalues_at(precision)]
        for of, dash in (("small_median", "solid"), ("large_median", "dot"))
    ]
    return Figure(
        title="Relative error of the eigenvalues diag(QᵀKQ), median within a factor of 10 of the smallest "
        "(dotted: of the largest)",
        views=alone(Panel("", curves, levels=(1,))),
        x=RANGE,
        y="relative error",
        log="xy",
    )


def _update_figure(result: PrecisionResult) -> Figure:
    """A row of panels a floor: each form of the update, with eigenvalues at its own precision and at "highest"."""
    ranges = sorted(result.config.ranges)

    def curves(floor: float, exact: bool, form: str) -> list[Curve]:
        found = []
        for precision in result.config.precisions:
            rows = result.updates_at(precision, "highest" if exact else precision, form, floor)
            found.append(Curve(key=precision, x=ranges, y=[row.error for row in rows], mark=OWN))
            if not all(row.positive for row in rows):
                errors = [math.nan if row.positive else row.error for row in rows]
                found.append(Curve(key=precision, x=ranges, y=errors, dash="", mark="x"))
        return found

    panels = [
        Panel(f"{form}{', exact Λ' if exact else ''}, floor {floor:g}", curves(floor, exact, form), levels=(1,))
        for floor, exact, form in product(result.config.relative_floors, (False, True), FORMS)
    ]
    return Figure(
        title="Relative error of the KL update, median (exact Λ: eigenvalues at “highest”; a cross: not positive "
        "semi-definite)",
        views=alone(*panels),
        x=RANGE,
        y="relative error",
        log="xy",
        columns=2 * len(FORMS),
    )


def _eigenvalue_table(result: PrecisionResult, precision: str) -> Table:
    rows = result.eigenvalues_at(precision)
    return Table(
        title=f"diag(QᵀKQ) at {precision!r} ({PRECISIONS[precision]}): relative error by decade",
        head=_head(result),
        rows=[
            *((words, *_cells(rows, measure)) for words, measure in EIGENVALUE_MEASURES.items()),
            ("below zero", *((Number(row.negative, f"{row.negative:.0%}"),) for row in rows)),
        ],
        keys=[precision] * (len(EIGENVALUE_MEASURES) + 1),
    )


def _update_table(result: PrecisionResult, floor: float, precision: str) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            form if own == precision else "· float32 Λ",
            *((Number(row.error, _short(row.error) + ("" if row.positive else "*")),) for row in updates),
        )
        for _, own, form in ways(precision)
        for updates in [result.updates_at(precision, own, form, floor)]
    ]
    return Table(
        title=f"KL update at {precision!r} ({PRECISIONS[precision]}), floor {floor:g}: error (*: not positive)",
        head=_head(result),
        rows=rows,
        keys=[precision] * len(rows),
    )


def _asymmetry_table(result: PrecisionResult) -> Table:
    config = result.config
    rows = {
        (precision, floor): result.updates_at(precision, precision, "published", floor)
        for floor, precision in product(config.relative_floors, config.precisions)
    }
    return Table(
        title="Published KL update: largest asymmetry, by precision and floor",
        head=_head(result),
        rows=[(f"{precision}, {floor:g}", *_cells(found, "asymmetry")) for (precision, floor), found in rows.items()],
        keys=[precision for precision, _ in rows],
    )


def _head(result: PrecisionResult) -> tuple[str, ...]:
    return ("range", *map(_short, sorted(result.config.ranges)))


def _cells(rows: Sequence[EigenvalueRow | UpdateRow], measure: str) -> list[Cell]:
    return [(Number(value, _short(value)),) for value in (getattr(row, measure) for row in rows)]


def _short(value: float) -> str:
    """One digit: orders of magnitude are the finding, the file has six digits."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return mantissa if int(exponent) == 0 else f"{mantissa}e{int(exponent)}"
