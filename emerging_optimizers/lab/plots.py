"""The lab's pictures on paper: described figures become PNG files. The only place that imports matplotlib."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Paper
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.palette import DARK
from emerging_optimizers.lab.views.describe import OWN, Curve, Figure, Key, Panel, View

LINES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "": "none"}
# Inches: a panel that stands alone, one of several, and what titles, labels and the legend take.
ALONE, IN_A_ROW, IN_A_GRID = (6.4, 4.2), (3.6, 3.4), (3.6, 2.7)
ROOM, LEGEND = 0.6, 1.8


def save_figure(figure: Paper, path: Path, dpi: int) -> None:
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


def draw(view: View, name: str, path: Path) -> None:
    """Draws a picture of an experiment: its figures, and a legend of the keys that they show.

    Args:
        view: What the experiment shows.
        name: Which of its pictures.
        path: The PNG file to write.
    """
    rows = view.pictures[name]
    widths = [[_size(figure)[0] for figure in row] for row in rows]
    heights = [max(_size(figure)[1] for figure in row) for row in rows]
    whole = max(map(sum, widths))
    paper = plt.figure(figsize=(LEGEND + whole, sum(heights)), layout="constrained")
    keys = {key.name: key for key in view.keys}
    bands = paper.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for band, row, shares in zip(bands, rows, widths, strict=True):
        shares = [*shares, max(whole - sum(shares), 1e-3)]  # what is left stays empty
        places = band.subfigures(1, len(shares), width_ratios=shares, squeeze=False)[0]
        for place, figure in zip(places, row, strict=False):
            _draw_figure(place, figure, keys)
    curves = [curve for row in rows for figure in row for panel in _panels(figure) for curve in panel.curves]
    shown, marked = {curve.key for curve in curves}, {curve.key for curve in curves if curve.mark == OWN}
    entries = [_entry(key, key.name in marked) for key in view.keys if key.name in shown]
    paper.legend(handles=entries, loc="outside right center", frameon=False)
    save_figure(paper, path, dpi=100)


def _panels(figure: Figure) -> list[Panel]:
    """The view that is printed."""
    views = figure.views
    return list(next(iter(views.values())) if figure.printed is None else views[figure.printed])


def _shape(figure: Figure) -> tuple[int, int]:
    """Rows and columns of panels."""
    count = len(_panels(figure))
    columns = min(figure.columns, count)
    return -(-count // columns), columns


def _size(figure: Figure) -> tuple[float, float]:
    rows, columns = _shape(figure)
    width, height = ALONE if rows * columns == 1 else IN_A_ROW if rows == 1 else IN_A_GRID
    return ROOM + width * columns, ROOM + height * rows


def _draw_figure(place: SubFigure, figure: Figure, keys: Mapping[str, Key]) -> None:
    rows, columns = _shape(figure)
    grid = place.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = _panels(figure)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, keys)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    axes = grid[0, 0]  # the others follow it
    if "x" in figure.log:
        axes.set_xscale("log")
    if "y" in figure.log:
        axes.set_yscale("log", nonpositive="mask")
    if rows > 1:
        for other in grid.flat:
            other.yaxis.set_minor_locator(NullLocator())  # in twelve panels half of the drawing's time
    if figure.ticks:
        axes.set_xticks([*figure.ticks], [*figure.ticks.values()])
    axes.set_ylim(*figure.limits)
    printed = "" if figure.printed is None else f", {figure.printed}"
    place.suptitle(f"{figure.title}{printed}", fontsize="medium", wrap=True)
    for axes in grid[-1]:
        axes.set_xlabel(figure.x)
    for axes in grid[:, 0]:
        axes.set_ylabel(figure.y)


def _draw_panel(axes: Axes, panel: Panel, keys: Mapping[str, Key]) -> None:
    for curve in panel.curves:
        x = range(1, len(curve.y) + 1) if curve.x is None else curve.x
        axes.plot(x, curve.y, **_style(curve, keys[curve.key]))
        if curve.band is not None:
            axes.fill_between(x, *curve.band, color=keys[curve.key].color, alpha=0.15, linewidth=0)
    for place in panel.lines:
        axes.axvline(place, color=DARK, alpha=0.5, linestyle=":", linewidth=1)
    for level in panel.levels:
        axes.axhline(level, color=DARK, alpha=0.5, linestyle=":", linewidth=1)
    axes.set_title(panel.title, fontsize="small")


def _style(curve: Curve, key: Key) -> dict[str, Any]:
    return {
        "color": key.color,
        "linestyle": LINES[key.dash if curve.dash is None else curve.dash],
        "linewidth": 1.2,
        "alpha": 0.4 if curve.faint else 1,
        "marker": (key.mark if curve.mark == OWN else curve.mark) or "none",
        "markersize": 8 if curve.dash == "" else 4,
        "fillstyle": "none" if curve.dash == "" else "full",
    }


def _entry(key: Key, marked: bool) -> Line2D:
    label = f"{key.name}: {key.note}" if key.note else key.name
    look = {"color": key.color, "linestyle": LINES[key.dash], "marker": key.mark if marked else "none"}
    return Line2D([], [], label=label, markersize=4, **look)
