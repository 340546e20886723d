"""Power iteration and balanced factors against the singular value decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emerging_optimizers.linalg.low_rank import balanced_factors, leading_left, rank_of
from emerging_optimizers.linalg.power_iteration import power_iteration


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Iterations from a random start to within 10 %, of ten Gaussian matrices of the shape (measured, the worst: 5 %, 9 %,
# 8 % and 7 %). The vectors converge with the gap between the first two singular values, which a Gaussian hardly has.
@pytest.mark.parametrize(("shape", "steps"), [((10, 8), 3), ((32, 16), 5), ((64, 32), 8), ((100, 50), 8)])
def test_it_converges_from_a_random_start_and_never_overestimates(shape, steps):
    W = gaussian(10, *shape)
    true = torch.linalg.matrix_norm(W, 2)
    sigma, u, v = power_iteration(W, gaussian(10, shape[0], seed=1), steps)
    assert (sigma <= true * (1 + 1e-12)).all()
    assert (sigma >= 0.9 * true).all()
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(10, dtype=torch.float64))


def test_vectors_are_a_singular_pair_once_converged():
    U, V = (torch.linalg.qr(gaussian(3, n, 6, seed=n)).Q for n in (9, 7))
    W = U @ torch.diag_embed(torch.tensor([4.0, 2, 1, 1, 0.5, 0], dtype=torch.float64).expand(3, 6)) @ V.mT
    sigma, u, v = power_iteration(W, gaussian(3, 9, seed=1), steps=30)  # (2 / 4)^(2 * 30)
    torch.testing.assert_close(sigma, torch.full((3,), 4.0, dtype=torch.float64))
    torch.testing.assert_close((W @ v.unsqueeze(-1)).squeeze(-1), 4 * u)
    torch.testing.assert_close((W.mT @ u.unsqueeze(-1)).squeeze(-1), 4 * v)


def test_exact_vectors_stay_and_need_no_iteration():
    W = gaussian(4, 8, 5)
    for steps in (0, 1):
        sigma, u, _ = power_iteration(W, leading_left(W), steps)
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(W, 2))
        torch.testing.assert_close(u, leading_left(W))


def test_a_zero_matrix_gives_zero_and_keeps_the_vector_so_that_it_can_go_on():
    start = gaussian(1, 6)
    sigma, u, v = power_iteration(torch.zeros(1, 6, 4, dtype=torch.float64), start, 3)
    assert sigma.item() == 0
    assert not v.any()
    torch.testing.assert_close(u, start / start.norm())
    W = gaussian(1, 6, 4, seed=2)
    assert power_iteration(W, u, 30)[0].item() == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 9), deficit=st.integers(0, 9))
def test_balanced_factors_are_the_best_approximation_and_none_is_dead(m, n, rank, deficit):
    r, true = rank_of(m, n, rank), max(0, min(m, n) - deficit)
    W = gaussian(2, m, true) @ gaussian(2, true, n, seed=1)
    A, B, u_A, u_B, lost = balanced_factors(W, r)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(A @ B.mT, U[..., :r] * sigma[:, None, :r] @ Vh[:, :r])
    torch.testing.assert_close(lost * W.norm(dim=(1, 2)), sigma[:, r:].norm(dim=-1))
    assert (A.norm(dim=-2) > 0).all()  # where W has no such direction, B's gradient is not zero
    for X, u in ((A, u_A), (B, u_B)):
        torch.testing.assert_close(power_iteration(X, u, 0)[0], torch.linalg.matrix_norm(X, 2))
        torch.testing.assert_close(u.norm(dim=-1), torch.ones(2, dtype=torch.float64))


def test_random_vectors_follow_the_seed_and_move_no_generator():
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        torch.randn(seed + 1)  # how far the generator is does not matter
        before = torch.get_rng_state()
        A = balanced_factors(torch.zeros(1, 6, 4), 3).A
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(A.mT @ A, torch.eye(3)[None], atol=1e-6, rtol=0)
        return A

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
