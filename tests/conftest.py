"""Fixtures that every test shares, and what of the table is collected."""

import gc
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from emerging_optimizers.engine import executors
from emerging_optimizers.linalg.precision import reduced_precision


def asks_for_gpu(config: pytest.Config) -> bool:
    """Whether the marker expression names `gpu`, as `make test-gpu` does."""
    return "gpu" in re.findall(r"\w+", config.option.markexpr)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` runs on the CPU; its twin on CUDA exists where the marker expression names `gpu`.

    The twins double the table. Where nobody asks for them they would be thousands of skips between which one that
    matters is not seen.
    """
    if "device" in metafunc.fixturenames:
        twin = [pytest.param("cuda", marks=pytest.mark.gpu)] if asks_for_gpu(metafunc.config) else []
        metafunc.parametrize("device", ["cpu", *twin], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are left out unless the marker expression names them; without a CUDA device they say so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not asks_for_gpu(config):
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    elif not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What importing and collecting have left stays: a collection, which many tests ask for, passes over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the table runs on."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright of the extra 'dev' is not installed")
    with playwright.sync_playwright() as session:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), session.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("there is no Chromium; CONTRIBUTING.md says how to get one")
        browser = session.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _a_case_at_medium_is_about_bfloat16(request: pytest.FixtureRequest) -> Iterator[None]:
    """Also on a CPU where "medium" is float32: a row of a table that names it is there for the rounding."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    rounded = getattr(case, "kwargs", {}).get("fp32_matmul_prec") == "medium"
    with reduced_precision("bfloat16") if rounded else nullcontext():
        yield


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules are traced, and then run by torch's operators: code generation costs seconds a graph."""
    monkeypatch.setattr(executors, "BACKEND", "eager")
