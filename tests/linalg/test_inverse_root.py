"""Inverse roots against their definition."""

import pytest
import torch

from emerging_optimizers.linalg.inverse_root import inverse_root, inverse_sqrt_cans, inverse_sqrt_eigh
from emerging_optimizers.linalg.precision import fp32_matmul_precision


def definite(size: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(3, size, 4 * size, dtype=dtype)
    return x @ x.mT / (4 * size)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_p_th_power_of_the_inverse_root_is_the_inverse(p: int) -> None:
    k = definite()
    power = torch.linalg.matrix_power(inverse_root(k, p, eps=1e-30), p)
    torch.testing.assert_close(power @ k, torch.eye(7, dtype=k.dtype).expand_as(k), rtol=0, atol=1e-10)


def test_the_damping_bounds_the_root_and_a_zero_eigenvalue_gives_zero() -> None:
    k, eps = torch.diag_embed(torch.tensor([[1.0, 1e-2, 1e-4, 1e-6, 0.0]])), 1e-4
    values = inverse_root(k, p=4, eps=eps).diagonal(dim1=-2, dim2=-1)[0]
    assert values.argmax() == 2  # the eigenvalue eps itself
    assert values[2].item() == pytest.approx(eps**-0.25 / 2)
    assert values[4] == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-4)], ids=str)
def test_cans_agrees_with_eigh(dtype: torch.dtype, tolerance: float) -> None:
    k = definite(dtype=dtype)
    torch.testing.assert_close(inverse_sqrt_cans(k), inverse_sqrt_eigh(k), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_sqrt_cans(k[0]), inverse_sqrt_cans(k)[0])


def test_cans_names_what_it_cannot_take() -> None:
    with pytest.raises(TypeError, match=r"shape \(3, 2\); give one square matrix"):
        inverse_sqrt_cans(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="give float32 or float64"):
        inverse_sqrt_cans(torch.eye(3, dtype=torch.bfloat16))
    with fp32_matmul_precision("medium"), pytest.raises(RuntimeError, match="'high' or 'highest'"):
        inverse_sqrt_cans(torch.eye(3))
