"""Shampoo: momentum between the inverse roots of two Kronecker factors.

    L <- mean(G G^T)        R <- mean(G^T G)        weights shampoo_beta^age, normalised
    W <- W - lr L^(-1/p) M R^(-1/p)        M <- mu M + (1 - mu) G
    W <- W - lr L^(-2/p) M                 where the other side is too long; W - lr M where both are

Gupta, Koren and Singer, 2018, arXiv 1802.09568, with running means and the damped root x / (x^2 + e^2) of
x = lam^(1/p), e = eps^(1/p).
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


def damped_inverse_root(K: Tensor, p: float, eps: float) -> Tensor:
    """Sum of x / (x^2 + e^2) q q^T over the eigenpairs."""
    result = torch.zeros_like(K)
    values, vectors = torch.linalg.eigh(K)
    for value, q in zip(values, vectors.T, strict=True):
        x, e = max(float(value), 0.0) ** (1 / p), eps ** (1 / p)
        result += x / (x * x + e * e) * torch.outer(q, q)
    return result


class ReferenceShampoo:
    """Shampoo on one matrix in float64; it keeps every gradient and forms the means anew."""

    def __init__(
        self,
        lr: float,
        momentum: float = 0.9,
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        p_root_inv: int = 4,
        weight_decay_method: str = "decoupled",
        max_precond_dim: int = 10000,
    ) -> None:
        self.lr, self.momentum, self.shampoo_beta, self.eps = lr, momentum, shampoo_beta, eps
        self.weight_decay, self.weight_decay_method, self.p = weight_decay, weight_decay_method, p_root_inv
        self.max_precond_dim = max_precond_dim
        self.t = 0
        self.gradients: list[Tensor] = []

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W = weight.double()
        self.t += 1
        self.gradients.insert(0, decay_gradient(grad.double(), W, self.weight_decay, self.weight_decay_method))

        m, n = W.shape
        L, R, M = (torch.zeros(size, dtype=torch.float64) for size in ((m, m), (n, n), (m, n)))
        total = sum(self.shampoo_beta**age for age in range(self.t))
        for age, G in enumerate(self.gradients):
            L += self.shampoo_beta**age / total * G @ G.T
            R += self.shampoo_beta**age / total * G.T @ G
            M += (1 - self.momentum) * self.momentum**age * G

        U, short = M, [size <= self.max_precond_dim for size in (m, n)]
        root = self.p if all(short) else self.p / 2
        if short[0]:
            U = damped_inverse_root(L, root, self.eps) @ U
        if short[1]:
            U = U @ damped_inverse_root(R, root, self.eps)
        return decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method) - self.lr * U
