"""The examples that users read, run as they stand: docstrings of every module, code blocks of pages."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch.distributed as dist

import emerging_optimizers
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "distributed",
            "field",
            "gallery",
            "index",
            "migrate",
            "optimizers",
            "orthogonalizers",
            "precision",
            "qk_clip",
            "routing",
            "spectron",
            "start",
            "trust",
            "tune",
            "watching",
            "write",
        )
    ),
)
# As under torchrun with one process, for the page about several.
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
# Without these the modules of a package cannot be imported, and need not be: what the `lab` extra installs, and triton.
OPTIONAL = {**dict.fromkeys(("tyro", "rich", "matplotlib", "jinja2", "plotly"), ".lab"), "triton": ".linalg.kernels"}


def modules() -> list[str]:
    found = pkgutil.walk_packages(emerging_optimizers.__path__, "emerging_optimizers.", onerror=lambda name: None)
    return ["emerging_optimizers", *(module.name for module in found)]


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_hold(name, tmp_path, monkeypatch):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if OPTIONAL.get(str(missing.name), "?") not in name:
            raise
        pytest.skip(f"{missing.name} is not installed")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "the captured output shows the examples that failed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    if not page.exists():
        pytest.skip(f"there is no {page.name} here")
    text = page.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    monkeypatch.chdir(tmp_path)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    program = ModuleType("page")  # a module, so that what it defines can be pickled, as in a program of one's own
    monkeypatch.setitem(sys.modules, "page", program)
    try:
        with patch.dict(OPTIMIZERS):  # a page may register one
            for block in blocks:
                line = text[: block.start(1)].count("\n")
                exec(compile("\n" * line + block[1], str(page), "exec"), vars(program))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_link_to_the_repository_names_a_file():
    """Of a folder the site has nothing to show, and its build fails."""
    wrong = []
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s:]+)[^):]*\)", page.read_text()):
            if "generated" not in (*page.parts, *Path(target).parts) and not (page.parent / target).is_file():
                wrong.append(f"{page.name}: {target}")
    assert not wrong
