"""Sinkhorn: momentum, one step ahead, whose rows and columns are divided by their norms in turn.

    M <- mu M + (1 - mu) G        N = mu M + (1 - mu) G        W <- W - lr c sqrt(n) S(N)

S sets rows to zero that are short against the mean row, then divides rows, columns, ..., rows. DeepSeek-V4.1, 2026.
"""

import math

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


def divide_rows(X: Tensor) -> Tensor:
    """Each row by its norm; a row of zeros stays."""
    return torch.stack([row / math.sqrt(float(row @ row)) if float(row @ row) else row for row in X])


class ReferenceSinkhorn:
    """Sinkhorn on one matrix in float64."""

    def __init__(
        self,
        lr: float = 3e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        num_steps: int = 11,
        zero_row_threshold: float = 1e-3,
        lr_correction: float = 0.18,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.mu, self.steps, self.threshold = lr, momentum, num_steps, zero_row_threshold
        self.c, self.weight_decay, self.weight_decay_method = lr_correction, weight_decay, weight_decay_method
        self.t = 0
        self.momentum_buffer = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W = weight.double()
        G = decay_gradient(grad.double(), W, self.weight_decay, self.weight_decay_method)
        if self.t == 0:
            self.momentum_buffer = torch.zeros_like(W)
        self.t += 1
        self.momentum_buffer = self.mu * self.momentum_buffer + (1 - self.mu) * G
        X = self.mu * self.momentum_buffer + (1 - self.mu) * G
        norms = [math.sqrt(float(row @ row)) for row in X]
        mean = sum(norms) / len(norms)
        X = torch.stack([row * (norm > self.threshold * mean) for row, norm in zip(X, norms, strict=True)])
        for k in range(self.steps):
            X = divide_rows(X) if k % 2 == 0 else divide_rows(X.T).T
        U = self.c * math.sqrt(W.shape[1]) * X
        return decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method) - self.lr * U
