"""Spectron: momentum, orthogonalised, on the two factors of a weight of low rank.

    W = A B^T          G_A = G B          G_B = G^T A
    M_X <- b M_X + (1 - b) G_X            O_X = f(M_X / ||M_X||_F) / c
    X <- k X - lr O_X / (sigma_A + sigma_B + 1)

Janson, Oyallon and Belilovsky, 2026, arXiv 2602.12429. f are Muon's polynomials, evaluated on singular values; c is the
maximum of f on [0, 1], k the factor of weight decay. sigma_X comes from Algorithm 3 of the paper, one matrix-vector
product at a time, from the exact singular vectors of the first factors.
"""

import math

import torch
from torch import Tensor

from .muon import odd_polynomials, orthogonalize, schedule
from .weight_decay import decay_gradient, decay_weight


def leading(matrix: Tensor, u: Tensor, steps: int) -> tuple[float, Tensor]:
    """An estimate of the largest singular value, and of its left vector."""
    for _ in range(steps):
        v = matrix.T @ u
        v = v / v.norm()
        u = matrix @ v
        u = u / u.norm()
    return float((matrix.T @ u).norm()), u


class ReferenceSpectron:
    """Spectron on one dense matrix in float64; ``fp32_matmul_prec`` has no meaning here but for its safety margin."""

    def __init__(
        self,
        lr: float = 3e-4,
        rank: int = 64,
        momentum_beta: float = 0.9,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
        fp32_matmul_prec: str = "medium",
        num_ns_steps: int = 5,
        num_power_iter: int = 1,
        coefficient_type: str = "quintic",
        rank_ratio: float | None = None,
        truncation_tolerance: float | None = None,
    ) -> None:
        del truncation_tolerance
        self.lr, self.rank, self.rank_ratio, self.momentum_beta = lr, rank, rank_ratio, momentum_beta
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.num_power_iter = num_power_iter
        self.coefficients = schedule(coefficient_type, num_ns_steps)
        self.c = max(abs(odd_polynomials(k / 10000, self.coefficients)) for k in range(10001))
        self.c *= 1 + (2**-7 if fp32_matmul_prec == "medium" else 2**-18)
        self.t = 0

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            r = min(self.rank, *W.shape)
            if self.rank_ratio is not None:
                r = max(1, math.floor(self.rank_ratio * min(W.shape)))
            U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
            self.factor_A = U[:, :r] @ torch.diag(sigma[:r].sqrt())
            self.factor_B = Vh[:r].T @ torch.diag(sigma[:r].sqrt())
            self.momentum_A, self.momentum_B = torch.zeros_like(self.factor_A), torch.zeros_like(self.factor_B)
            self.u_A, self.u_B = U[:, 0], Vh[0]
        self.t += 1

        total = 1.0
        decayed, momenta = [], []
        grads = {"A": G @ self.factor_B, "B": G.T @ self.factor_A}
        for x, grad_x in grads.items():
            X = getattr(self, f"factor_{x}")
            grad_x = decay_gradient(grad_x, X, self.weight_decay, self.weight_decay_method)
            X = decay_weight(X, self.lr, self.weight_decay, self.weight_decay_method)
            M = self.momentum_beta * getattr(self, f"momentum_{x}") + (1 - self.momentum_beta) * grad_x
            estimate, u = leading(X, getattr(self, f"u_{x}"), self.num_power_iter)
            total += estimate
            setattr(self, f"momentum_{x}", M)
            setattr(self, f"u_{x}", u)
            decayed.append(X)
            momenta.append(M)

        rho = self.lr / total
        self.factor_A, self.factor_B = (
            X - rho / self.c * orthogonalize(M, self.coefficients) for X, M in zip(decayed, momenta, strict=True)
        )
        return self.factor_A @ self.factor_B.T
