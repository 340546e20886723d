"""SPlus: the sign of the momentum, taken in the eigenbases of Shampoo's factors.

    M <- mu M + (1 - mu) G        W <- W - lr 2 / (m + n) Q_L sign(Q_L^T M Q_R) Q_R^T

What is zero but for rounding, against its row, its column and all of the rotated momentum, has the sign 0.

Frans, Levine and Abbeel, 2025, arXiv 2506.07254. Factors, bases and their start are those of ``soap.py``.
"""

from typing import Any

import torch
from torch import Tensor

from .soap import ReferenceSOAP
from .weight_decay import decay_gradient, decay_weight


class ReferenceSPlus(ReferenceSOAP):
    """SPlus on one matrix in float64."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, **options: Any) -> None:
        common = {"shampoo_beta": 0.999, "weight_decay": 0.0, "use_eigh": True, "precondition_frequency": 100}
        super().__init__(lr, **{**common, **options})
        self.momentum = momentum

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W = weight.double()
        G = decay_gradient(grad.double(), W, self.weight_decay, self.weight_decay_method)
        if self.t == 0:
            self.start(W)
            self.momentum_buffer = torch.zeros_like(G)
        self.t += 1
        self.update_factors(G)
        self.exp_avg_sq = torch.ones_like(G)  # says only that there was a gradient
        if not self.overlap and self.refreshes_now():
            self.refresh_bases()
        self.momentum_buffer = self.momentum * self.momentum_buffer + (1 - self.momentum) * G
        U, X = torch.zeros_like(G), self.Q_L.T @ self.momentum_buffer @ self.Q_R
        for i in range(G.shape[0]):
            for j in range(G.shape[1]):
                size = max(X[i].norm(), X[:, j].norm(), X.norm() / G.numel() ** 0.25)
                if abs(X[i, j]) > 8 * torch.finfo(G.dtype).eps * size:
                    U += torch.sign(X[i, j]) * torch.outer(self.Q_L[:, i], self.Q_R[:, j])
        if self.overlap and self.refreshes_now():
            self.refresh_bases()
        decayed = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        return decayed - self.lr * 2 / sum(G.shape) * U
