"""The documentation as a site: it builds without a warning, and every link inside it leads somewhere."""

import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import emerging_optimizers
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]


class Links(HTMLParser):
    """What a page links to and loads, and the names in it that a link may lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.names: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.names.add(value or "")
            elif key in ("href", "src") and value:
                self.links.add(unescape(value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="sphinx of the extra 'docs' is not installed")
    pytest.importorskip("myst_nb", reason="myst-nb of the extra 'docs' is not installed")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(place / "doctrees"), "docs", str(place / "html")]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return place / "html"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_link_of_the_site_leads_to_a_file_and_to_a_name_in_it(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if "_static" not in path.parts}
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_optimizer_has_a_page_with_its_equations_and_arguments(site: Path) -> None:
    for name in OPTIMIZERS:
        text = (site / "generated" / "optimizers" / f"{name}.html").read_text()
        assert "When not to use it" in text, name
        assert "Parameters" in text, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loads = re.findall(
            r'<(?:script|img|iframe|link rel="(?:stylesheet|preload)")[^>]+(?:src|href)="([^"]+)"', path.read_text()
        )
        assert not [link for link in loads if urlsplit(link).scheme in ("http", "https")], path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_api_has_every_public_name(site: Path) -> None:
    public = [name for name in emerging_optimizers.__all__ if not name.startswith("__")]
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert not [name for name in public if not re.search(rf'id="[\w.]+\.{name}"', text)]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_search_finds_muon(site: Path, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(f"{(site / 'search.html').as_uri()}?q=Muon")
    tab.wait_for_selector("#search-results li a")
    assert "Muon (muon)" in tab.locator("#search-results li a").all_inner_texts()
    tab.close()
