"""Results into docs/performance.md, between its markers, and a chart for each file of results."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.palette import COLORS, DARK
from emerging_optimizers.lab.record import read_json
from emerging_optimizers.lab.views.describe import Table

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEAD = ("arm", "ms a step", "ratio", "to", "/ floor", "/ least floor", "state B/p", "extra B/p", "first step s")
CLOCKS = {"cpu": "CPU time of the process", "wall": "wall clock", "device": "time between events of the device"}


def render(results: Sequence[Path], page: Path, images: Path) -> list[Path]:
    """Rewrites what stands between the markers of the page and draws the charts.

    Args:
        results: Files of results.
        page: A Markdown file with the two markers.
        images: Folder of the charts.

    Returns:
        The files that were written.
    """
    parts, written = [], [page]
    for path in results:
        result = read_json(path)
        parts.append(section(path.stem, result))
        if result["workloads"]:
            chart = images / f"performance_{path.stem}.png"
            draw(result, chart)
            link = chart.relative_to(page.parent) if chart.is_relative_to(page.parent) else chart
            parts.append(f"![Milliseconds a step; the lines are floors]({link})")
            written.append(chart)
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have one line {BEGIN} and one line {END}")
    inside = "\n\n".join((BEGIN, *parts, END))
    text = re.sub(f"{BEGIN}.*{END}", lambda _: inside, text, flags=re.DOTALL)
    write_atomically({page: text.encode()})
    return written


def section(name: str, result: dict[str, Any]) -> str:
    """All tables of one file."""
    parts = [f"## {name}"]
    for workload, found in result["workloads"].items():
        parts += [table(workload, found).markdown(), notes(found)]
    if result["promises"]:
        rows = [
            (p["what"], f"{p['median']:.3g}", f"{p['limit']:g}", "yes" if p["kept"] else "**no**")
            for p in result["promises"]["found"]
        ]
        head = ("promise", "measured", "limit", "kept")
        parts.append(Table(title="Promises", head=head, rows=rows).markdown())
    return "\n\n".join(parts)


def table(name: str, found: dict[str, Any]) -> Table:
    """A workload: arms in their order, medians, in brackets the quartiles."""
    rows = []
    for arm, a in found["arms"].items():
        if "error" in a:
            continue
        ratio, against = ("", "")
        if "ratio" in a:
            ratio, against = f"{a['ratio']:.3f} ({_span(a['ratio_quartiles'], 1, '.2f')})", a["compared_with"]
        floor, n = a.get("floor_s"), found["parameters"]
        over = [f"{a['median_s'] / floor[kind]:.2f}" if floor else "" for kind in ("usual", "least")]
        extra = "" if a["extra_bytes"] is None else f"{a['extra_bytes'] / n:.2f}"
        time = f"{1000 * a['median_s']:.4g} ({_span(a['quartiles_s'], 1000, '.4g')})"
        label = f"{arm}{'' if a['check']['passes'] else ' †'}"
        cells = (label, time, ratio, against, *over, f"{a['state_bytes'] / n:.2f}", extra, f"{a['first_step_s']:.2g}")
        rows.append(cells)
    return Table(title=f"{name}: {found['about']} ({found['part']})", head=HEAD, rows=rows)


def notes(found: dict[str, Any]) -> str:
    """What a reader of the table must know, and why an arm is missing from it."""
    e, rates = found["environment"], found["rates"]
    measured = ", ".join(
        f"{kind} {value / 1e9:,.0f} G{'B' if kind == 'copy' else 'FLOP'}/s" for kind, value in rates.items()
    )
    lines = [
        f"{CLOCKS[found['clock']]}, {found['rounds']} rounds, {e['threads']} thread{'s' * (e['threads'] > 1)}, "
        f"{e.get('gpu') or e['cpu']}, torch {e['torch']}, {e['date']}, revision {str(e['revision'])[:12]}, "
        f"load {e['load'][0]:g} before and {e['load'][1]:g} after. Rates of the floors: {measured}."
    ]
    if any("error" not in a and not a["check"]["passes"] for a in found["arms"].values()):
        lines.append(
            "† less exact than a plain bfloat16 iteration by more than the factor that this library allows itself."
        )
    missing = [f"{arm} ({a['error']})" for arm, a in found["arms"].items() if "error" in a]
    if missing:
        lines.append(f"Not measured: {'; '.join(missing)}.")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel a workload: bars are medians, whiskers quartiles, the two lines across a bar its floors."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from emerging_optimizers.lab.plots import save_figure

    panels = {
        name: {arm: a for arm, a in w["arms"].items() if "error" not in a} for name, w in result["workloads"].items()
    }
    panels = {name: arms for name, arms in panels.items() if arms}
    heights = [len(arms) + 2 for arms in panels.values()]
    figure, axes = plt.subplots(
        *(len(panels), 1),
        figsize=(9, 0.28 * sum(heights) + 0.5),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel, (name, arms) in zip(axes[:, 0], panels.items(), strict=True):
        w = result["workloads"][name]
        for y, a in enumerate(arms.values()):
            low, middle, high = (1000 * s for s in (a["quartiles_s"][0], a["median_s"], a["quartiles_s"][1]))
            color = COLORS[0] if a["peer"] == "ours" else COLORS[1] if a["peer"] == "published" else COLORS[5]
            spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            panel.barh(y, middle, color=color, height=0.7, xerr=spread, error_kw={"elinewidth": 0.8})
            for kind, style in (("usual", "-"), ("least", ":")):
                if floor := a.get("floor_s"):
                    panel.vlines(1000 * floor[kind], y - 0.45, y + 0.45, color=DARK, linestyle=style, linewidth=1.5)
        panel.set_yticks(range(len(arms)), list(arms), fontsize=8)
        panel.invert_yaxis()
        panel.set_title(f"{name}: {w['about']} ({w['part']})", loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds a step")
    handles = [
        *(Patch(color=COLORS[i]) for i in (0, 1, 5)),
        *(Line2D([], [], color=DARK, linestyle=style) for style in ("-", ":")),
    ]
    labels = ("this library", "the published library", "others", "floor", "floor of the leanest form known")
    figure.legend(handles, labels, frameon=False, ncols=5, fontsize=8, loc="outside upper center")
    save_figure(figure, path, dpi=150)


def _span(values: Sequence[float], factor: float, form: str) -> str:
    return "–".join(format(factor * value, form) for value in values)
