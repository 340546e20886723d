from contextlib import suppress

import pytest
import torch

from emerging_optimizers.linalg.precision import fp32_matmul_precision

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
LEVELS = ["highest", "high", "medium"]


def snapshot() -> tuple[str, str, str]:
    """What a user can see: both backends, and the global name (torch refuses to give one where they disagree)."""
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:
        name = "mixed"
    return CUDA.fp32_precision, MKLDNN.fp32_precision, name


@pytest.fixture(autouse=True)
def put_back():
    cuda, mkldnn, name = snapshot()
    yield
    CUDA.fp32_precision = MKLDNN.fp32_precision = "ieee"
    torch.set_float32_matmul_precision(name)
    CUDA.fp32_precision, MKLDNN.fp32_precision = cuda, mkldnn


# How a user may have chosen the precision before: the global function, or one backend through the newer API.
CHOICES = {
    "default": {},
    "global high": {"name": "high"},
    "global medium": {"name": "medium"},
    "cuda tf32": {"cuda": "tf32"},
    "cuda ieee": {"cuda": "ieee"},
    "mkldnn bf16": {"mkldnn": "bf16"},
    "global high, cuda ieee": {"name": "high", "cuda": "ieee"},
}


def choose(name: str | None = None, cuda: str | None = None, mkldnn: str | None = None) -> None:
    if name:
        torch.set_float32_matmul_precision(name)
    if cuda:
        CUDA.fp32_precision = cuda
    if mkldnn:
        MKLDNN.fp32_precision = mkldnn


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_precision_holds_inside_and_the_users_choice_is_back_after_it(choice, level):
    choose(**CHOICES[choice])
    before = snapshot()
    with fp32_matmul_precision(level):
        assert torch.get_float32_matmul_precision() == level
    assert snapshot() == before


@pytest.mark.parametrize("choice", CHOICES)
def test_it_is_back_after_an_exception(choice):
    choose(**CHOICES[choice])
    before = snapshot()
    with suppress(ZeroDivisionError), fp32_matmul_precision("high"):
        raise ZeroDivisionError
    assert snapshot() == before


@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("inner", LEVELS)
def test_contexts_nest(outer, inner):
    before = snapshot()
    with fp32_matmul_precision(outer):
        between = snapshot()
        with fp32_matmul_precision(inner):
            assert torch.get_float32_matmul_precision() == inner
        assert snapshot() == between
    assert snapshot() == before


def test_an_unknown_name_raises_before_anything_has_changed():
    before = snapshot()
    with pytest.raises(ValueError, match="'low' is not one of highest, high, medium"), fp32_matmul_precision("low"):
        pytest.fail("the block ran")
    assert snapshot() == before
