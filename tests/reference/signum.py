"""Signum: the sign of the momentum.

    M <- b M + (1 - b) G        W <- W - lr s sign(M)

Bernstein et al., 2018, arXiv 1802.04434. With nesterov the sign is that of b M / (1 - b^(t+1)) + (1 - b) G / (1 - b^t);
without bias correction both divisors are 1. s is 2 / (rows + columns) with shape scaling, else 1.
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


class ReferenceSignum:
    """Signum on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        nesterov: bool = False,
        use_shape_scaling: bool = False,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.momentum = lr, momentum
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.correct_bias, self.nesterov, self.use_shape_scaling = correct_bias, nesterov, use_shape_scaling
        self.t = 0
        self.exp_avg = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G, b = weight.double(), grad.double(), self.momentum
        if self.t == 0:
            self.exp_avg = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        self.exp_avg = b * self.exp_avg + (1 - b) * G
        looked_at = self.exp_avg
        if self.nesterov:
            now = 1 - b**self.t if self.correct_bias else 1.0
            ahead = 1 - b ** (self.t + 1) if self.correct_bias else 1.0
            looked_at = b * self.exp_avg / ahead + (1 - b) * G / now
        scale = 2 / (W.shape[0] + W.shape[1]) if self.use_shape_scaling else 1.0
        return W - self.lr * scale * torch.sign(looked_at)
