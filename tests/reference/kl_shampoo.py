"""KL-Shampoo: momentum between the inverse square roots of the two factors of SOAP's Kullback-Leibler form.

    W <- W - lr L^-1/2 M R^-1/2        M: bias-corrected mean of the gradients

Lin et al., 2025, arXiv 2509.03378. Factors, bases and their start are those of ``soap.py``.
"""

from typing import Any

import torch
from torch import Tensor

from .soap import ReferenceSOAP, rayleigh_quotients
from .weight_decay import decay_gradient, decay_weight


class ReferenceKLShampoo(ReferenceSOAP):
    """KL-Shampoo on one matrix in float64."""

    def __init__(self, lr: float, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(lr, (momentum, 0.0), use_kl_shampoo=True, **options)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W = weight.double()
        G = decay_gradient(grad.double(), W, self.weight_decay, self.weight_decay_method)
        if self.t == 0:
            self.start(W)
        self.t += 1
        self.update_factors(G)
        if not self.overlap and self.refreshes_now():
            self.refresh_bases()
        self.exp_avg_sq = torch.ones_like(G)  # says only that there was a gradient

        # ``refresh_bases`` turns the momentum; here it is kept turned and added to in the basis
        mu = self.betas[0]
        self.exp_avg = mu * self.exp_avg + (1 - mu) * self.Q_L.T @ G @ self.Q_R
        M = self.Q_L @ self.exp_avg @ self.Q_R.T / (1 - mu**self.t)
        U = self.inverse_square_root(self.L, self.Q_L) @ M @ self.inverse_square_root(self.R, self.Q_R)
        if self.overlap and self.refreshes_now():
            self.refresh_bases()
        return decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method) - self.lr * U

    def inverse_square_root(self, K: Tensor | None, Q: Tensor) -> Tensor:
        """Sum of q q^T / sqrt(max(q^T K q, eps, share of their mean)); the identity where there is no factor."""
        if K is None:
            return torch.eye(len(Q), dtype=torch.float64)
        values = rayleigh_quotients(K, Q)
        floor = max(self.eps, self.relative_floor * sum(values) / len(values))
        result = torch.zeros_like(K)
        for value, q in zip(values, Q.T, strict=True):
            result += torch.outer(q, q) / max(value, floor) ** 0.5
        return result
