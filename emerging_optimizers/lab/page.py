"""The page of the report: described figures and tables become HTML.

The template shows any `Section`; its keys are buttons that switch curves and rows off. The page is whole: its content
security policy forbids the browser to fetch anything.

The figures are plotly's. Its script makes the file 5 MB where bokeh's would make it 2, but its figures are SVG, which
print, scale and can be tested, one call (`Plotly.react`) serves selection, theme and width, and it brings one further
package where bokeh brings a web server. No package on PyPI carries one of its partial bundles.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]  # plotly ships no types

from emerging_optimizers.lab.palette import DARK
from emerging_optimizers.lab.views.describe import OWN, Curve, Figure, Key, Table, View

# What plotly calls the markers of matplotlib.
SYMBOLS = {
    "o": "circle",
    ".": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "x": "x-thin-open",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One run of an experiment: what it shows, how it is repeated, what it ran on."""

    id: str
    view: View
    command: str
    environment: Mapping[str, str]


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
    environment.filters["paint"] = _paint
    environment.tests["table"] = lambda part: isinstance(part, Table)
    template = environment.get_template("report.html.j2")
    return template.render(sections=sections, missing=missing, plotly=Markup(get_plotlyjs()))


def _paint(key: Key) -> str:
    """The colour of a key on the page, whose ink is light where the paper is dark."""
    return "currentColor" if key.color == DARK else key.color


def _plot(figure: Figure, keys: Sequence[Key]) -> dict[str, Any]:
    """A figure as the page's script takes it: curves with their styles, ranges over all views."""
    named = {key.name: key for key in keys}
    curves = [curve for panels in figure.views.values() for panel in panels for curve in panel.curves]
    xs = [x for curve in curves for x in (curve.x or (1, len(curve.y)))]
    ys = [y for curve in curves for y in curve.y]
    ticks = [[*figure.ticks], [words.replace("\n", "<br>") for words in figure.ticks.values()]]
    return {
        "x": {"title": figure.x, **_axis(xs, "x" in figure.log), **({"ticks": ticks} if figure.ticks else {})},
        "y": {"title": figure.y, **_axis(ys, "y" in figure.log, figure.limits)},
        "views": {
            name: [
                {
                    "title": panel.title,
                    "lines": list(panel.lines),
                    "levels": list(panel.levels),
                    "curves": [_trace(curve, named[curve.key]) for curve in panel.curves],
                }
                for panel in panels
            ]
            for name, panels in figure.views.items()
        },
    }


def _trace(curve: Curve, key: Key) -> dict[str, Any]:
    return {
        "key": curve.key,
        "color": _paint(key),
        "dash": key.dash if curve.dash is None else curve.dash,
        "faint": curve.faint,
        "symbol": SYMBOLS[key.mark if curve.mark == OWN else curve.mark] if curve.mark else "",
        "x": None if curve.x is None else list(curve.x),
        "y": _finite(curve.y),
        "band": None if curve.band is None else [_finite(edge) for edge in curve.band],
    }


def _finite(values: Iterable[float]) -> list[float | None]:
    """What is not finite is a gap."""
    return [value if math.isfinite(value) else None for value in values]


def _axis(
    values: Iterable[float], log: bool, limits: tuple[float | None, float | None] = (None, None)
) -> dict[str, Any]:
    """Type and range of an axis that all panels and views share; the range of a logarithmic one is in powers of ten."""
    fit = [math.log10(x) if log else x for x in values if math.isfinite(x) and not (log and x <= 0)] or [0.0]
    room = 0.03 * (max(fit) - min(fit)) or 0.5
    ends = [min(fit) - room, max(fit) + room]
    return {
        "type": "log" if log else "linear",
        "range": [end if limit is None else limit for end, limit in zip(ends, limits, strict=True)],
    }
