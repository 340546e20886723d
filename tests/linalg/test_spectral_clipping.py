"""Bounds on singular values, against an SVD."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.spectral_clipping import (
    spectral_clip,
    spectral_clipped_weight_decay,
    spectral_hardcap,
)

VALUES = torch.tensor([5.0, 2.0, 1.5, 0.7, 0.3, 0.05], dtype=torch.float64)


def matrices(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(2, n, 6, generator=generator, dtype=torch.float64)).Q for n in (rows, columns))
    return (U.to(dtype), ((U * VALUES) @ V.mT).to(dtype), V.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_singular_values_are_clipped_and_vectors_kept(shape, dtype):
    U, X, V = matrices(*shape, dtype)
    for out, values in (
        (spectral_hardcap(X, 1.0), VALUES.clamp(max=1.0)),
        (spectral_clip(X, 0.5, 1.0), VALUES.clamp(0.5, 1.0)),
        (spectral_clip(X, -1.0, 1.8), VALUES.clamp(max=1.8)),
        (spectral_clipped_weight_decay(X, 1.0, 0.25), VALUES - 0.25 * (VALUES - VALUES.clamp(max=1.0))),
    ):
        torch.testing.assert_close(out, (U * values.to(dtype)) @ V.mT, rtol=0, atol=5e-3)
        assert out.dtype == dtype


def test_one_matrix_is_a_stack_of_one_and_zero_stays_zero():
    _, X, _ = matrices(9, 6)
    for function in (spectral_clip, spectral_hardcap, spectral_clipped_weight_decay):
        torch.testing.assert_close(function(X[0]), function(X)[0])
        assert torch.equal(function(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


def test_a_small_weight_does_not_decay():
    X = 0.1 * torch.eye(4, 3)
    torch.testing.assert_close(spectral_clipped_weight_decay(X, 1.0, 1.0), X, rtol=0, atol=1e-5)


def test_bounds_in_the_wrong_order_raise():
    with pytest.raises(ValueError, match=r"sigma_min=2.0 exceeds sigma_max=1.0"):
        spectral_clip(torch.eye(2), 2.0, 1.0)
