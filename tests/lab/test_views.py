"""What is described once is drawn alike on paper and on the page."""

import math

import numpy as np
import pytest

pytest.importorskip("plotly", reason="plotly of the extra 'lab' is not installed")

from emerging_optimizers.lab import plots
from emerging_optimizers.lab.eigenbasis import EigenbasisConfig, run_eigenbasis
from emerging_optimizers.lab.gallery import GalleryConfig, run_gallery
from emerging_optimizers.lab.page import _plot
from emerging_optimizers.lab.precision import PrecisionConfig, run_precision
from emerging_optimizers.lab.runs import TrainResult
from emerging_optimizers.lab.spike import SpikeConfig, run_spike
from emerging_optimizers.lab.views.describe import Table, View, number
from emerging_optimizers.lab.views.eigenbasis import eigenbasis_view
from emerging_optimizers.lab.views.gallery import gallery_view
from emerging_optimizers.lab.views.precision import precision_view
from emerging_optimizers.lab.views.spike import spike_view
from emerging_optimizers.lab.views.tf32 import tf32_view
from emerging_optimizers.lab.views.train import train_view
from tests.lab.test_tf32 import CONFIG, filled

SPIKE = SpikeConfig(optimizers=("muon", "soap-guarded"), shape=(4, 3), steps=30, spike_at=(5, 9), spike_scale=(10.0,))
VIEWS = {
    "spike": lambda: spike_view(run_spike(SPIKE)),
    "eigenbasis": lambda: eigenbasis_view(
        run_eigenbasis(EigenbasisConfig(shape=(6, 4), steps=8, spike_at=4, offsets=(1,), top=2))
    ),
    "precision": lambda: precision_view(run_precision(PrecisionConfig(shape=(6, 8), ranges=(10.0, 1e6), draws=2))),
    "tf32": lambda: tf32_view(filled(CONFIG)),
    "gallery": lambda: gallery_view(run_gallery(GalleryConfig(item="physics", steps=3))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_paper_and_page_draw_the_same_curves(name, tmp_path, monkeypatch):
    view: View = VIEWS[name]()
    for picture, rows in view.pictures.items():
        papers = []
        with monkeypatch.context() as patch:
            patch.setattr(plots, "save_figure", lambda paper, path, dpi, papers=papers: papers.append(paper))
            plots.draw(view, picture, tmp_path / "picture.png")
        (paper,) = papers
        drawn = [axes for axes in paper.get_axes() if axes.get_visible()]
        on_page = []
        for figure in (figure for row in rows for figure in row):
            assert figure in view.parts
            views = _plot(figure, view.keys)["views"]
            on_page += views[figure.printed or next(iter(views))]
        assert [axes.get_title() for axes in drawn] == [panel["title"] for panel in on_page]
        for axes, panel in zip(drawn, on_page, strict=True):
            lines = axes.get_lines()
            assert len(lines) == sum(len(panel[kind]) for kind in ("curves", "lines", "levels"))
            for line, curve in zip(lines, panel["curves"], strict=False):
                y = [math.nan if value is None else value for value in curve["y"]]
                np.testing.assert_array_equal(line.get_ydata(), y)
                if curve["color"] != "currentColor":
                    assert line.get_color() == curve["color"]
        (legend,) = paper.legends
        shown = {curve["key"] for panel in on_page for curve in panel["curves"]}
        assert [text.get_text().partition(":")[0] for text in legend.get_texts()] == [
            key.name for key in view.keys if key.name in shown
        ]
        plots.plt.close(paper)


def test_a_table_says_the_same_everywhere():
    table = Table(
        title="T",
        head=("who", "two\nlines"),
        rows=[("a", number(1.25, ".1f") + number(None, "d")), ("a", number(math.inf, ".1f")), ("b", number(3, "d"))],
        keys=("a", "a", "b"),
        grouped=True,
        between=" | ",
    )
    assert table.texts == [["a", "1.2 | -"], ["", "inf"], ["b", "3"]]
    assert "| who | two lines |" in table.markdown()
    assert [cell.value for _, cells in table.rows for cell in cells] == [1.25, None, None, 3]


def test_a_training_run_without_the_baseline_has_no_level(tiny, tmp_path):
    from rich.console import Console

    from emerging_optimizers.lab.train import run_train

    result = run_train(tiny, tmp_path / "run", Console(quiet=True))
    by_step, _ = train_view(result).pictures["loss"][0]
    assert by_step.views[""][0].levels == (result.runs[0].best_loss,)
    others = TrainResult(folder=result.folder, config=tiny, runs=result.runs[1:])
    by_step, _ = train_view(others).pictures["loss"][0]
    assert by_step.views[""][0].levels == ()
    assert "AdamW" not in by_step.title
