"""The HTML report: its numbers are those of the results, it needs no network, and a browser shows it."""

import json
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tyro
from rich.console import Console

pytest.importorskip("plotly", reason="plotly of the extra 'lab' is not installed")

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.commands import Command
from emerging_optimizers.lab.config import TrainConfig, UsageError
from emerging_optimizers.lab.eigenbasis import EigenbasisConfig, run_eigenbasis
from emerging_optimizers.lab.gallery import GalleryConfig, GalleryResult, run_gallery
from emerging_optimizers.lab.page import _plot
from emerging_optimizers.lab.precision import PrecisionConfig, run_precision
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.report import KINDS, write_report
from emerging_optimizers.lab.spike import SpikeConfig, run_spike
from emerging_optimizers.lab.tf32 import TF32Config
from emerging_optimizers.lab.train import run_train
from emerging_optimizers.lab.views.describe import Curve, Figure, Key, Panel, Table, alone, number
from tests.lab.conftest import TINY
from tests.lab.test_tf32 import filled

CONFIGS = {
    "spike": SpikeConfig(
        optimizers=("adamw", "muon", "soap"), shape=(8, 6), steps=40, spike_at=(10, 20), spike_scale=(100.0, 1000.0)
    ),
    "eigenbasis": EigenbasisConfig(shape=(12, 8), steps=12, spike_at=5, offsets=(1, 2), top=3),
    "precision": PrecisionConfig(shape=(8, 16), ranges=(10.0, 1e6), draws=2),
    "gallery": GalleryConfig(item="physics", steps=3),
    "train": TrainConfig(**TINY, optimizers=("adamw", "lion"), lr={"lion": 1e-3}),
    "train_spiked": TrainConfig(**TINY, optimizers=("adamw",), spike_at=3, spike_scale=100.0),
    "tf32": TF32Config(optimizers=("rekls",), seeds=(0, 3), steps=12, spike_at=4),
}


class Page(HTMLParser):
    """The numbers of each section's tables, row by row, and everything that names a resource."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[str, list[float | None]]]] = {}
        self.resources: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.resources += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action", "data"}]
        if tag == "section":
            self.section = self.rows.setdefault(found["id"] or "", [])
        elif tag == "tr" and "data-key" in found:
            self.section.append((found["data-key"] or "", []))
        elif tag == "data":
            self.section[-1][1].append(json.loads(found["value"] or ""))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    made = {"spike": run_spike, "eigenbasis": run_eigenbasis, "precision": run_precision, "gallery": run_gallery}
    for name, run in made.items():
        write_json(runs / name / "result.json", run(CONFIGS[name]).to_json())
        write_json(runs / name / "environment.json", {**environment(1), "command": ["eopt", name]})
    write_json(runs / "tf32" / "result.json", filled(CONFIGS["tf32"]).to_json())
    write_json(runs / "tf32" / "environment.json", {**environment(1), "command": ["eopt", "tf32"]})
    for name in ("train", "train_spiked"):
        run_train(CONFIGS[name], runs / name, Console(quiet=True))
    main(["report", "--runs", str(runs), "--out", str(runs / "report.html")])
    return runs


@pytest.fixture(scope="module")
def page(runs: Path) -> Page:
    return Page((runs / "report.html").read_text())


def stored(runs: Path, name: str, file: str = "result.json") -> dict:
    return json.loads((runs / name / file).read_text())


def test_the_tables_of_the_spikes_hold_the_numbers_of_the_result(runs, page):
    table = stored(runs, "spike")["table"]
    cells = [table[i : i + 2] for i in range(0, len(table), 2)]  # a row of the page is two sizes of the spike
    recovery = [
        (pair[0]["optimizer"], [pair[0]["spike_at"], *(row[key] for row in pair for key in ("recovery", "settled"))])
        for pair in cells
    ]
    aftershock = [
        (pair[0]["optimizer"], [pair[0]["spike_at"], pair[0]["before"], *(row["aftershock"] for row in pair)])
        for pair in cells
    ]
    assert page.rows["spike"] == recovery + aftershock


def test_the_tables_of_the_other_experiments_hold_the_numbers_of_their_results(runs, page):
    eigenbasis, precision = stored(runs, "eigenbasis"), stored(runs, "precision")
    agreement = [(row["precision"], [row["update_rms"], row["eigenvalues"]]) for row in eigenbasis["agreement"]]
    assert page.rows["eigenbasis"][: len(agreement)] == agreement
    run = eigenbasis["runs"][0]
    assert [run["top1_left"][3], run["topk_left"][3], run["top1_left"][5], run["topk_left"][5]] == page.rows[
        "eigenbasis"
    ][len(agreement)][1][1:5]
    shown = {x for _, numbers in page.rows["precision"] for x in numbers}
    assert {row["small_worst"] for row in precision["eigenvalues"]} <= shown
    assert {row["error"] for row in precision["updates"]} <= shown
    summary = [(row["optimizer"], list(row.values())[1:]) for row in stored(runs, "train", "summary.json")]
    assert page.rows["train"] == summary
    spiked = [
        (row["optimizer"], [row["loss_before"], row["worst_loss"], row["worst_excess"]])
        for row in stored(runs, "train_spiked", "spike.json")
    ]
    assert [(key, numbers[:3]) for key, numbers in page.rows["train_spiked"][1:]] == spiked
    first = [run["final_loss"] for run in stored(runs, "tf32")["runs"] if run["seed"] == 0]
    assert [numbers[0] for _, numbers in page.rows["tf32"]] == first
    gallery = GalleryResult.from_json(stored(runs, "gallery"))
    losses = [(name, [*gallery.last(name)]) for name in gallery.recipes]
    assert [(key, numbers[:3]) for key, numbers in page.rows["gallery"][: len(losses)]] == losses


def test_nothing_is_fetched(runs, page):
    assert all(name.startswith("#") for name in page.resources)
    html = (runs / "report.html").read_text()
    assert "default-src 'none'" in html
    assert "@import" not in html.partition("</style>")[0]
    assert "url(" not in html.partition("</style>")[0]


def test_each_section_says_how_to_repeat_it_and_what_it_ran_on(runs, page):
    for section in write_report(runs, runs / "report.html"):
        assert tyro.cli(Command, args=shlex.split(section.command)[1:]).config == CONFIGS[section.id]
        assert section.command in page.text
        assert section.environment["torch"] in page.text


def test_what_is_not_there_yet_is_named(runs, tmp_path):
    shutil.copytree(runs / "spike", tmp_path / "spike")
    (section,) = write_report(tmp_path, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert section.id == "spike"
    missing = html.partition("Not here yet:")[2].partition("</p>")[0]
    assert all(kind.command in missing for kind in KINDS[1:])
    assert "eopt spike" not in missing


def test_without_a_run_there_is_nothing_to_show(tmp_path):
    with pytest.raises(SystemExit, match=r"no finished run under .*`eopt spike`.*another --runs"):
        main(["report", "--runs", str(tmp_path), "--out", str(tmp_path / "report.html")])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ["{", "{}", '{"config": {"shape": 3}}'])
def test_a_result_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "spike").mkdir()
    (tmp_path / "spike" / "result.json").write_text(text)
    with pytest.raises(UsageError, match=r"spike.result\.json cannot be read .*`eopt spike`"):
        write_report(tmp_path, tmp_path / "report.html")


def test_what_is_not_finite_is_a_gap():
    cells = [x for value in (None, float("nan"), 0.38667, 113.4) for x in number(value, ".3g")]
    assert [cell.text for cell in cells] == ["-", "nan", "0.387", "113"]
    assert [cell.value for cell in cells] == [None, None, 0.38667, 113.4]
    curve = Curve(key="a", y=[1.0, float("nan"), float("inf"), 100.0])
    figure = Figure(title="", views=alone(Panel("", [curve])), x="step", y="rms", log="y")
    spec = _plot(figure, [Key("a", "#0072B2")])
    assert spec["views"][""][0]["curves"][0]["y"] == [1.0, None, None, 100.0]
    assert spec["y"]["range"] == pytest.approx([-0.06, 2.06])
    json.dumps(spec, allow_nan=False)


def test_every_row_and_curve_belongs_to_a_button(runs):
    for section in write_report(runs, runs / "report.html"):
        names = {key.name for key in section.view.keys}
        for part in section.view.parts:
            if isinstance(part, Table):
                assert set(part.keys) <= names
                assert len(part.keys) == len(part.rows)
                assert all(len(cells) == len(part.head) for cells in part.rows)
            else:
                assert {curve.key for panels in part.views.values() for p in panels for curve in p.curves} <= names
                assert len({len(panels) for panels in part.views.values()}) == 1


# --- in a browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(browser, runs):
    """The report, loaded once (seconds on a busy machine); what the console said is in `loaded.said`."""
    tab = browser.new_page()
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.goto((runs / "report.html").as_uri())
    return tab


@pytest.fixture
def tab(loaded):
    """The report at the width of a desk. A test shows again what it hides."""
    loaded.set_viewport_size({"width": 1280, "height": 900})
    loaded.emulate_media(color_scheme="light")
    yield loaded
    assert loaded.said == []


def curves(tab, section: str) -> list[int]:
    """How many curves each panel of a section shows."""
    count = "panels => panels.map(panel => panel.querySelectorAll('.scatterlayer .trace').length)"
    return tab.locator(f"#{section} .panel").evaluate_all(count)


def comes_true(tab, condition: str, seconds: int = 60) -> bool:
    """Waits for a condition of JavaScript; playwright's own way to needs `eval`, which the page forbids."""
    return tab.evaluate(
        f"""new Promise(done => {{
            const end = Date.now() + {1000 * seconds}
            const look = () => {condition} ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 20)
            look()
        }})"""
    )


def test_it_loads_without_a_word_on_the_console_and_draws_every_panel(tab):
    assert curves(tab, "spike") == [3, *[3] * 4, *[6] * 2, *[3] * 3]
    assert all(count > 0 for section in CONFIGS for count in curves(tab, section))
    rows = tab.locator("#spike tbody tr:visible")
    assert rows.count() == 12
    assert rows.nth(0).inner_text().split()[:2] == ["adamw", "10"]


def test_a_click_on_a_button_hides_an_optimizer_everywhere_in_its_section(tab):
    tab.click("#spike .key[value=muon]")
    assert curves(tab, "spike") == [2, *[2] * 4, *[4] * 2, *[2] * 3]
    assert "muon" not in tab.locator("#spike tbody tr:visible").all_inner_texts()
    assert tab.locator("#spike tbody tr:visible").count() == 8
    tab.click("#spike .every[value=false]")
    assert set(curves(tab, "spike")) == {0}
    tab.click("#spike .every[value=true]")
    assert curves(tab, "spike")[0] == 3
    assert tab.locator("#spike tbody tr:visible").count() == 12


def test_a_view_shows_other_curves_and_a_zoom_all_panels(tab):
    def first() -> list:
        return tab.evaluate("document.querySelector('#spike figure:last-of-type .panel').data[1].y")

    before = first()
    tab.select_option("#spike select", label="×1,000 after 20 steps")
    assert first() != before
    panels = tab.locator("#spike .plots").nth(1).locator(".panel")
    panels.nth(3).scroll_into_view_if_needed()
    box = panels.nth(3).bounding_box()
    tab.mouse.move(box["x"] + 100, box["y"] + 40)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 200, box["y"] + 120, steps=4)
    tab.mouse.up()
    ranges = "panels => panels.map(panel => panel.layout.xaxis.range)"
    assert comes_true(tab, "document.querySelectorAll('#spike .plots')[1].zoom.x")
    zoomed = {tuple(x) for x in panels.evaluate_all(ranges)}
    assert len(zoomed) == 1

    def zooms_out() -> bool:
        tab.mouse.dblclick(box["x"] + 100, box["y"] + 60)
        return comes_true(tab, "!document.querySelectorAll('#spike .plots')[1].zoom.x", seconds=2)

    # On a busy machine the second click may come too late to make the first a double one.
    assert any(zooms_out() for _ in range(10))
    assert {tuple(x) for x in panels.evaluate_all(ranges)} != zoomed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(tab, scheme):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.emulate_media(color_scheme=scheme)
    assert comes_true(tab, "[...document.querySelectorAll('.panel')].every(p => p.scrollWidth <= p.clientWidth)")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    ink = "getComputedStyle(document.querySelector('.key line')).stroke"
    assert tab.evaluate(ink) == {"light": "rgb(34, 34, 34)", "dark": "rgb(232, 230, 225)"}[scheme]
