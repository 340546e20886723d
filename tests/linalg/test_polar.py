"""Exact polar factors, and the Gram form of Newton-Schulz, against SVDs in float64."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import coefficients
from emerging_optimizers.linalg.newton_schulz import gram_newton_schulz, newton_schulz
from emerging_optimizers.linalg.polar import polar_qdwh, polar_svd

SHAPES = [(12, 5), (5, 12), (8, 8), (1, 6), (6, 1)]
ROUTES = pytest.mark.parametrize("polar", [polar_qdwh, polar_svd])


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A (2, rows, columns) stack with these singular values."""
    n = len(values)
    U = torch.linalg.qr(gaussian(2, rows, n, seed=1, dtype=torch.float64)).Q
    V = torch.linalg.qr(gaussian(2, columns, n, seed=2, dtype=torch.float64)).Q
    return ((U * values.double()) @ V.mT).to(dtype)


def oracle(x: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    return U @ Vh


@ROUTES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_it_is_the_polar_factor(polar, shape, dtype, tolerance):
    x = gaussian(3, *shape, dtype=dtype)
    torch.testing.assert_close(polar(x).double(), oracle(x), rtol=0, atol=tolerance)


@ROUTES
@pytest.mark.parametrize(("condition", "dtype"), [(1e3, torch.float32), (1e5, torch.float32), (1e12, torch.float64)])
def test_all_singular_values_end_at_one_at_any_condition_of_the_dtype(polar, condition, dtype):
    x = with_values(torch.logspace(0, -1, 16, base=condition), 24, 16, dtype)
    values = torch.linalg.svdvals(polar(x))
    assert (values - 1).abs().max() < 40 * torch.finfo(dtype).eps


@ROUTES
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_input_does_not_matter(polar, scale):
    x = gaussian(2, 9, 6)
    torch.testing.assert_close(polar(x * scale), polar(x), rtol=0, atol=1e-5)


@ROUTES
def test_zero_stays_zero_and_a_null_space_is_not_amplified_beyond_one(polar):
    assert torch.equal(polar(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))
    x = with_values(torch.tensor([3.0, 1.0, 0.0, 0.0]), 8, 6, torch.float64)
    values = torch.linalg.svdvals(polar(x))
    torch.testing.assert_close(values[:, :2], torch.ones(2, 2, dtype=torch.float64))
    assert values.max() < 1 + 1e-12
    if polar is polar_svd:
        assert values[:, 2:].max() < 1e-12


@ROUTES
def test_a_row_that_is_not_finite_leaves_the_others_alone(polar):
    x = gaussian(3, 6, 4)
    expected = polar(x)
    x[1, 2, 3] = float("nan")
    out = polar(x)
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    assert not out[1].isfinite().all()


@pytest.mark.parametrize("restart", [1, 2, 3])
@pytest.mark.parametrize("name", ["quintic", "polar_express", "cans", "cubic5"])
def test_the_gram_form_is_newton_schulz(name, restart):
    sets = coefficients(name, 8 if name == "polar_express" else 5)
    for shape in SHAPES:
        x = gaussian(2, *shape, dtype=torch.float64)
        torch.testing.assert_close(
            gram_newton_schulz(x, sets, restart=restart), newton_schulz(x, sets), rtol=1e-9, atol=1e-9
        )
    x = with_values(torch.logspace(0, -3, 16), 16, 48, torch.float32)
    exact = newton_schulz(x.double(), sets)
    error = (gram_newton_schulz(x, sets, restart=restart).double() - exact).abs().max()
    assert error < max(4e-5, 10 * (newton_schulz(x, sets).double() - exact).abs().max())


def test_the_gram_form_holds_in_bfloat16():
    x = with_values(torch.logspace(0, -3, 32), 32, 96, torch.float32)
    for form in (newton_schulz, gram_newton_schulz):
        out = form(x, coefficients("quintic", 5), compute_dtype=torch.bfloat16)
        assert out.dtype == torch.float32
        assert torch.linalg.svdvals(out).max() < 1.2
