"""MAdam and RMSProp: the two ends of Adam.

MAdam is Adam with eps = 0, whose second moment is kept multiplied by 2^k:

    M <- b1 M + (1 - b1) G      V <- b2 V + (1 - b2) 2^k G^2      W <- W - lr 2^(k/2) M' / sqrt(V')

where M' and V' are bias-corrected; nothing moves where V is zero. RMSProp has no momentum and no correction:

    V <- a V + (1 - a) G^2      W <- W - lr G / (sqrt(V) + eps)

Tieleman and Hinton, 2012, lecture 6.5 of Neural Networks for Machine Learning.
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


class ReferenceMAdam:
    """MAdam on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        scale_log2: int = 16,
        correct_bias: bool = True,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.betas, self.scale = lr, betas, 2.0**scale_log2
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.correct_bias = correct_bias
        self.t = 0
        self.exp_avg = self.exp_avg_sq_scaled = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg = self.exp_avg_sq_scaled = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        b1, b2 = self.betas
        self.exp_avg = b1 * self.exp_avg + (1 - b1) * G
        self.exp_avg_sq_scaled = b2 * self.exp_avg_sq_scaled + (1 - b2) * self.scale * G * G
        unbias1 = 1 - b1**self.t if self.correct_bias else 1.0
        unbias2 = 1 - b2**self.t if self.correct_bias else 1.0
        moves = self.exp_avg_sq_scaled > 0
        root = torch.sqrt(torch.where(moves, self.exp_avg_sq_scaled, 1.0) / unbias2 / self.scale)
        return W - self.lr * moves * self.exp_avg / unbias1 / root


class ReferenceRMSProp:
    """RMSProp on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.alpha, self.eps = lr, alpha, eps
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.t = 0
        self.exp_avg_sq = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg_sq = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        self.exp_avg_sq = self.alpha * self.exp_avg_sq + (1 - self.alpha) * G * G
        return W - self.lr * G / (torch.sqrt(self.exp_avg_sq) + self.eps)
