"""What a release is made from agrees with itself; `make release-check` does the rest (`tests/release.py`)."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from emerging_optimizers._version import __version__
from tests import release

ROOT = Path(__file__).parents[1]
yaml = pytest.importorskip("yaml", reason="PyYAML, which a package of the extra 'dev' brings, is not installed")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES if path.parent.name == "workflows"}
PYTHONS = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]


def jobs() -> list[tuple[str, dict[str, Any]]]:
    return [(f"{file}/{name}", job) for file, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()]


def test_there_are_workflows_for_tests_the_site_and_releases() -> None:
    assert {*WORKFLOWS} == {"ci", "docs", "release"}
    assert all(flow["permissions"] == {"contents": "read"} for flow in WORKFLOWS.values())  # a job asks for more


@pytest.mark.parametrize(("name", "job"), jobs(), ids=[name for name, _ in jobs()])
def test_what_a_workflow_makes_is_a_target_of_the_makefile(name: str, job: dict[str, Any]) -> None:
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    called = re.findall(r"\bmake ([a-z-]+)", " ".join(step.get("run", "") for step in job["steps"]))
    assert {*called} <= targets
    assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)


def test_every_promised_python_and_torch_is_tried() -> None:
    ci = WORKFLOWS["ci"]["jobs"]
    torches = ci["test"]["strategy"]["matrix"]["torch"]
    assert ci["test"]["strategy"]["matrix"]["python"] == ci["release-check"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert pinned[1] in torches
    (needed,) = PROJECT["dependencies"]
    assert torches[0].startswith(needed.removeprefix("torch>=") + ".")


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_pages_name_the_lowest_versions(page: str) -> None:
    text = (ROOT / page).read_text()
    lowest = PROJECT["dependencies"][0].removeprefix("torch>=")
    assert {*re.findall(r"Python (3\.\d+) or later", text)} == {PYTHONS[0]}
    assert {*re.findall(r"torch (\d\.\d+)\s+or\s+later", text)} == {lowest}


def test_a_bug_report_asks_for_what_eopt_says() -> None:
    assert "`eopt --version --json`" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert all(yaml.safe_load(path.read_text()) for path in FILES)


def test_the_version_stands_in_the_changelog_and_in_the_citation() -> None:
    release.changelog((ROOT / "CHANGELOG.md").read_text())
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert f"## [{__version__}] - {cited['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] == PROJECT["authors"]


WHOLE = {"emerging_optimizers/__init__.py": 10, "emerging_optimizers/py.typed": 0}


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("wheel", {"emerging_optimizers/__init__.py": 10}, "the wheel lacks emerging_optimizers/py.typed"),
        ("wheel", WHOLE | {"tests/cases.py": 10}, "tests/cases.py, which is outside of the package"),
        ("wheel", WHOLE | {"emerging_optimizers/data.bin": 10**6}, "data.bin with 1000000 bytes"),
        ("sdist", WHOLE | {"runs/demo/result.json": 10}, "runs/demo/result.json, which belongs to no release"),
    ],
)
def test_what_has_no_business_in_a_release_is_found(kind: str, sizes: dict[str, int], words: str) -> None:
    release.looked_into(kind, WHOLE, {*WHOLE})
    with pytest.raises(release.Bad, match=re.escape(words)):
        release.looked_into(kind, sizes, {*WHOLE})
