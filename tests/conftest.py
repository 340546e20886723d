"""Fixtures that every test shares."""

import pytest
import torch

from emerging_optimizers.engine import executors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the table runs on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules are traced, and then run by torch's operators: code generation costs seconds a graph."""
    monkeypatch.setattr(executors, "BACKEND", "eager")
