"""MARS on one matrix in float64: AdamW on a corrected gradient.

    C = G + gamma b1 / (1 - b1) (G - G_old), G_old = 0 at first; C / max(1, ||C||_F) is what Adam's moments see.

Yuan et al. 2024, arXiv 2411.10438, MARS-AdamW with one gradient a step.
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


class ReferenceMARS:
    """MARS-AdamW, approximate form."""

    def __init__(
        self,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        gamma: float = 0.025,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.betas, self.eps, self.gamma = lr, betas, eps, gamma
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.t = 0

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        if self.t == 0:
            self.exp_avg = self.exp_avg_sq = self.last_grad = torch.zeros_like(G)
        self.t += 1
        b1, b2 = self.betas
        C = G + self.gamma * b1 / (1 - b1) * (G - self.last_grad)
        self.last_grad = G
        if C.norm() > 1:
            C = C / C.norm()
        self.exp_avg = b1 * self.exp_avg + (1 - b1) * C
        self.exp_avg_sq = b2 * self.exp_avg_sq + (1 - b2) * C**2
        U = self.exp_avg / (1 - b1**self.t) / ((self.exp_avg_sq / (1 - b2**self.t)).sqrt() + self.eps)
        decayed = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        return decayed - self.lr * U
