import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.orthogonal_iteration import orthogonal_iteration


def rotation(n: int, seed: int = 0) -> Tensor:
    g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(g).Q


def with_spectrum(spectrum: Tensor, seed: int = 0) -> Tensor:
    Q = rotation(spectrum.numel(), seed)
    return (Q * spectrum @ Q.mT)[None]


@pytest.mark.parametrize("n", [2, 5, 12])
def test_on_a_decaying_spectrum_it_converges_to_the_basis_of_eigh(n):
    k = with_spectrum(2.0 ** -torch.arange(n, dtype=torch.float64))
    got = orthogonal_iteration(k, rotation(n, seed=1)[None], steps=60)
    overlap = (got.mT @ eigh_descending(k)[1]).abs()
    torch.testing.assert_close(overlap, torch.eye(n, dtype=torch.float64)[None], rtol=0, atol=1e-9)


def test_several_steps_are_one_step_several_times():
    k, q = with_spectrum(torch.linspace(3, 1, 6, dtype=torch.float64)), torch.eye(6, dtype=torch.float64)[None]
    q = orthogonal_iteration(k, q, steps=40)  # in order, so that one sort is enough
    by_hand = q
    for _ in range(3):
        by_hand = orthogonal_iteration(k, by_hand)
    assert torch.equal(orthogonal_iteration(k, q, steps=3), by_hand)


def test_columns_are_taken_up_by_falling_rayleigh_quotient():
    k = torch.diag(torch.tensor([1.0, 4.0, 2.0]))[None]
    assert torch.equal(orthogonal_iteration(k, torch.eye(3)[None]).abs()[0], torch.eye(3)[:, [1, 2, 0]])


@pytest.mark.parametrize("n", [64, 128, 256])
def test_the_basis_is_orthogonal_in_float32_over_a_spectrum_of_eight_decades(n):
    k = with_spectrum(torch.logspace(0, -8, n, dtype=torch.float64)).float()
    q = rotation(n).float()[None]  # tracks K: these are its eigenvectors
    out = orthogonal_iteration(k, q)
    assert (out.mT @ out - torch.eye(n)).abs().max() < 2e-5


def test_a_stack_equals_its_matrices_one_by_one():
    k = torch.cat([with_spectrum(torch.linspace(0.1, 1, 8, dtype=torch.float64), seed) for seed in range(3)])
    q = torch.eye(8, dtype=torch.float64).repeat(3, 1, 1)
    one_by_one = torch.cat([orthogonal_iteration(k[i : i + 1], q[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(orthogonal_iteration(k, q), one_by_one, rtol=0, atol=1e-13)


def test_a_row_that_is_not_finite_leaves_the_other_rows_exact():
    k = torch.cat([with_spectrum(torch.linspace(0.1, 1, 5, dtype=torch.float64), seed) for seed in range(3)])
    q = torch.eye(5, dtype=torch.float64).repeat(3, 1, 1)
    expected = orthogonal_iteration(k, q)
    k[1, 0, 0] = torch.nan
    assert torch.equal(orthogonal_iteration(k, q)[[0, 2]], expected[[0, 2]])
