"""Whitening in eigenbases, KL-Shampoo's update, and bases that follow their factors."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.eigenbasis import eigenvalues, floored, follow, kl_sides, whiten

B, M, N = 2, 6, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(size: int, seed: int) -> Tensor:
    x_BNN = normal(B, size, size, seed=seed)
    return x_BNN @ x_BNN.mT


def decomposed(k_BNN: Tensor) -> tuple[Tensor, Tensor]:
    values_BN, q_BNN = torch.linalg.eigh(k_BNN)
    return q_BNN, values_BN.rsqrt()


def test_each_factor_sees_the_gradient_whitened_by_the_other_one():
    G, L, R = normal(B, M, N), factor(M, 1), factor(N, 2)
    (Q_L, roots_L), (Q_R, roots_R) = decomposed(L), decomposed(R)
    X, Y = kl_sides(G, Q_L, Q_R, roots_L, roots_R)
    torch.testing.assert_close(X @ X.mT, G @ torch.linalg.inv(R) @ G.mT / N)
    torch.testing.assert_close(Y.mT @ Y, G.mT @ torch.linalg.inv(L) @ G / M)
    out = Q_L @ whiten(G, Q_L, Q_R, roots_L, roots_R) @ Q_R.mT  # L^-1/2 G R^-1/2
    root_L, root_R = ((Q * roots.reciprocal().unsqueeze(-2)) @ Q.mT for Q, roots in ((Q_L, roots_L), (Q_R, roots_R)))
    torch.testing.assert_close(root_L @ out @ root_R, G)


def test_a_side_that_is_none_is_left_alone():
    G, (Q_R, roots_R) = normal(B, M, N), decomposed(factor(N, 2))
    X, Y = kl_sides(G, None, Q_R, None, roots_R)
    torch.testing.assert_close(X, whiten(G, None, Q_R, None, roots_R) / N**0.5)
    torch.testing.assert_close(Y, G / M**0.5)
    assert follow(None, None, steps=1) == (None, None, None)
    assert eigenvalues(None, None) is None


def test_small_eigenvalues_count_as_a_share_of_their_mean_and_none_as_what_is_given():
    values = torch.tensor([[5.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[5.0, 1.0, 0.2], [3.0, 3.0, 3.0]])
    torch.testing.assert_close(floored(values, 1e-8, 0.1, torch.tensor([[7.0], [3.0]])), expected)
    assert floored(values, 1e-8).min() == torch.tensor(1e-8)


@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("exact", [False, True])
def test_a_basis_follows_with_its_rotation_and_eigenvalues(steps, exact):
    K = factor(N, 3)
    old = torch.linalg.qr(normal(B, N, N, seed=4)).Q
    new = follow(K, old, steps=steps, with_eigenvalues=True, exact=exact)
    torch.testing.assert_close(new.basis.mT @ new.basis, torch.eye(N, dtype=K.dtype).expand(B, N, N))
    torch.testing.assert_close(old @ new.rotation, new.basis)
    torch.testing.assert_close(new.eigvals, (new.basis.mT @ K @ new.basis).diagonal(dim1=-2, dim2=-1))
    assert follow(K, old, steps=steps).eigvals is None


def test_what_is_not_wanted_keeps_its_basis():
    K, old = factor(N, 3), torch.linalg.qr(normal(B, N, N, seed=4)).Q
    wanted = torch.tensor([True, False]).view(B, 1, 1)
    new = follow(K, old, steps=1, wanted=wanted, with_eigenvalues=True)
    assert torch.equal(new.basis[1], old[1])
    torch.testing.assert_close(new.eigvals, eigenvalues(K, new.basis))
    assert torch.equal(follow(K, old, steps=None, wanted=wanted).basis[1], torch.eye(N, dtype=K.dtype))
