import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.kronecker import conjugate_diagonal, project_in, project_out
from emerging_optimizers.linalg.scaling import muon_scale_factor


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases(left: bool, right: bool) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.linalg.qr(gaussian(2, 4, 4, seed=1)).Q if left else None,
        torch.linalg.qr(gaussian(2, 3, 3, seed=2)).Q if right else None,
    )


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_projections_are_inverse_and_a_side_of_none_is_the_identity(left, right):
    x, (Q_L, Q_R) = gaussian(2, 4, 3), bases(left, right)
    I_M, I_N = torch.eye(4, dtype=x.dtype), torch.eye(3, dtype=x.dtype)
    explicit = torch.stack([
        (I_M if Q_L is None else Q_L[b]).T @ x[b] @ (I_N if Q_R is None else Q_R[b]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(project_in(x, Q_L, Q_R), explicit)
    torch.testing.assert_close(project_out(project_in(x, Q_L, Q_R), Q_L, Q_R), x)
    torch.testing.assert_close(project_in(project_out(x, Q_L, Q_R), Q_L, Q_R), x)


def test_conjugate_diagonal_is_the_diagonal_of_the_conjugated_matrix():
    k, q = gaussian(2, 4, 4), bases(True, False)[0]
    torch.testing.assert_close(conjugate_diagonal(k, q), (q.mT @ k @ q).diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize(
    ("out", "inner", "mode", "factor"),
    [
        (64, 16, "spectral", 8.0),
        (16, 64, "spectral", 8.0),
        (64, 16, "shape_scaling", 2.0),
        (16, 64, "shape_scaling", 1.0),
        (64, 16, "unit_rms_norm", 2.0),
        (16, 64, "unit_rms_norm", 0.5),
    ],
)
def test_scale_factor(out, inner, mode, factor):
    assert muon_scale_factor(out, inner, mode) == factor
    if mode == "spectral":  # the default
        assert muon_scale_factor(out, inner) == factor


def test_an_unknown_scale_mode_is_an_error_that_lists_the_modes():
    with pytest.raises(ValueError, match=r"'spectrum' is not one of shape_scaling, spectral, unit_rms_norm"):
        muon_scale_factor(2, 2, "spectrum")
