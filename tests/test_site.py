"""The documentation as a site: it builds without a warning, every link leads somewhere, every page can be read."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

import emerging_optimizers
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page links to and loads, the names in it that a link may lead to, its tags, and its pictures' words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.names: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.alts.append(dict(attrs).get("alt") or "")
        for key, value in attrs:
            if key == "id":
                self.names.append(value or "")
            elif key in ("href", "src") and value:
                self.links.add(unescape(value))


def pages_of(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="sphinx of the extra 'docs' is not installed")
    pytest.importorskip("myst_nb", reason="myst-nb of the extra 'docs' is not installed")
    pytest.importorskip("mmdr", reason="mmdr of the extra 'docs' is not installed")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(place / "doctrees"), "docs", str(place / "html")]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return place / "html"


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_every_link_of_the_site_leads_to_a_file_and_to_a_name_in_it(site: Path) -> None:
    pages = pages_of(site)
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = unquote(parts.fragment)
            if not target.exists() or (name and target in pages and name not in pages[target].names):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_every_page_has_a_title_and_a_heading_and_its_names_once(site: Path) -> None:
    for path, page in pages_of(site).items():
        title = re.search(r"<title>\s*(\S.*?)</title>", path.read_text(), re.DOTALL)
        assert title, path
        assert not title[1].startswith("&lt;no title"), path
        assert page.tags.count("h1") == 1 or path.name == "search.html", path  # whose heading a script writes
        assert len(page.names) == len(set(page.names)), path


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_every_picture_is_described_in_words(site: Path) -> None:
    for path, page in pages_of(site).items():
        assert all(alt.strip() and "/" not in alt and not alt.endswith(".png") for alt in page.alts), (path, page.alts)


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["internals/architecture", "distributed"])
def test_blocks_of_mermaid_are_drawn(site: Path, name: str) -> None:
    blocks = re.findall(r"^```mermaid$", (ROOT / "docs" / f"{name}.md").read_text(), re.MULTILINE)
    assert blocks
    assert (site / f"{name}.html").read_text().count('<div class="drawing"><svg') == len(blocks)


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_the_notebooks_are_pages_with_their_figures_and_tables(site: Path) -> None:
    for path in sorted((ROOT / "examples" / "gradient_spike").glob("*.ipynb")):
        page = Page(site / "generated" / "notebooks" / f"{path.stem}.html")
        assert len(page.alts) == path.read_text().count('"image/png"'), path.name
        assert "table" in page.tags, path.name


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_every_optimizer_has_a_page_with_its_equations_and_arguments(site: Path) -> None:
    for name in OPTIMIZERS:
        text = (site / "generated" / "optimizers" / f"{name}.html").read_text()
        assert "When not to use it" in text, name
        assert f"{name}.png" in text, f"python -m benchmarks.starts measures {name}"
        assert "Parameters" in text, name


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_lines_on_the_page_of_an_optimizer_run(site: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "generated" / "optimizers" / f"{name}.rst").read_text()
    (code,) = re.findall(r"^   from emerging_optimizers import .+?optimizer = [^\n]+$", text, re.MULTILINE | re.DOTALL)
    names = {"model": torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))}
    exec(inspect.cleandoc(code), names)
    assert isinstance(names["optimizer"], torch.optim.Optimizer)
    for command in re.findall(r"^   eopt (estimate .+)$", text, re.MULTILINE):
        main(shlex.split(command.replace("12*768x768,4*3072x768", "2*8x8")))
        assert "time of a step" in capsys.readouterr().out


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loads = re.findall(
            r'<(?:script|img|iframe|link rel="(?:stylesheet|preload)")[^>]+(?:src|href)="([^"]+)"', path.read_text()
        )
        assert not [link for link in loads if urlsplit(link).scheme in ("http", "https")], path


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
def test_the_api_has_every_public_name(site: Path) -> None:
    public = [name for name in emerging_optimizers.__all__ if not name.startswith("__")]
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert not [name for name in public if not re.search(rf'id="[\w.]+\.{name}"', text)]


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
@pytest.mark.parametrize("width", [1280, 380])
def test_a_browser_has_nothing_to_say_and_scrolls_no_page_sideways(site: Path, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("requestfailed", lambda request: said.append(request.url))
    wide = []
    for path in sorted(site.rglob("*.html")):
        if "_static" in path.parts:
            continue
        tab.goto(path.as_uri())
        if tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            wide.append(str(path.relative_to(site)))
    tab.close()
    assert not said
    assert not wide


@pytest.mark.slow  # the site is built
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("words", "page"), [("Muon", "Muon (muon)"), ("GradScaler", "What is promised, and how it is tested")]
)
def test_the_search_finds(site: Path, browser: Any, words: str, page: str) -> None:
    tab = browser.new_page()
    tab.goto(f"{(site / 'search.html').as_uri()}?q={words}")
    tab.wait_for_selector(f"#search-results li a:text-is('{page}')")
    tab.close()
