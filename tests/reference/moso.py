"""MOSO: RMSProp of the momentum in the eigenbasis of the momentum's own shorter side.

    M <- mu M + (1 - mu) G        C <- EMA(M M^T)        Q: eigenvectors of C
    W <- W - lr Q RMSProp(Q^T M)

NVIDIA, 2026, Emerging-Optimizers. A tall matrix is stepped as its transpose.
"""

import math

import torch
from torch import Tensor

from .soap import eigenbasis, falling_order, orthogonal_iteration
from .weight_decay import decay_gradient, decay_weight


class ReferenceMOSO:
    """MOSO on one matrix in float64. The start "adam" has the identity as its first basis, "eigenbasis" has none."""

    def __init__(
        self,
        lr: float = 3e-4,
        momentum: float = 0.95,
        rms_beta: float = 0.95,
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_update_rms: float = 0.0,
        correct_bias: bool = True,
        first_step: str = "adam",
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.mu, self.rms_beta, self.shampoo_beta, self.eps = lr, momentum, rms_beta, shampoo_beta, eps
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.max_update_rms, self.correct_bias, self.first_step = max_update_rms, correct_bias, first_step
        self.t = 0
        self.momentum = self.v = self.C = self.Q = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W = weight.double()
        G = decay_gradient(grad.double(), W, self.weight_decay, self.weight_decay_method)
        tall = W.shape[0] > W.shape[1]
        U = self.direction(G.T).T if tall else self.direction(G)
        return decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method) - self.lr * U

    def direction(self, G: Tensor) -> Tensor:
        """The update of a matrix that is not tall."""
        if self.t == 0:
            rows = len(G)
            self.momentum, self.v = torch.zeros_like(G), torch.zeros_like(G)
            self.C, self.Q = torch.zeros(rows, rows, dtype=G.dtype), torch.eye(rows, dtype=G.dtype)
        self.t += 1
        self.momentum = self.mu * self.momentum + (1 - self.mu) * G
        share = (1 - self.shampoo_beta) / (1 - self.shampoo_beta**self.t)
        self.C = (1 - share) * self.C + share * self.momentum @ self.momentum.T

        old, first = self.Q, 1 if self.first_step == "eigenbasis" else 2
        if self.t == first:
            self.Q = eigenbasis(self.C)
        elif self.t > first:
            self.Q = orthogonal_iteration(self.C, old[:, falling_order(self.C, old)], 1)
        if self.first_step == "adam":  # variances of independent entries add with squared weights
            self.v = (self.Q.T @ old) ** 2 @ self.v

        rotated = self.Q.T @ self.momentum
        self.v = self.rms_beta * self.v + (1 - self.rms_beta) * rotated**2
        unbias = 1 - self.rms_beta**self.t if self.correct_bias else 1.0
        U = self.Q @ (rotated / (torch.sqrt(self.v / unbias) + self.eps))
        if self.max_update_rms > 0:
            rms = math.sqrt(float((U * U).mean()))
            U = U * min(1.0, self.max_update_rms / (rms + 1e-7))
        return U
