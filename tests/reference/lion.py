"""Lion: the sign of an interpolated momentum.

    U = sign(b1 M + (1 - b1) G)        M <- b2 M + (1 - b2) G        W <- W - lr U

Chen et al., 2023, arXiv 2302.06675. No bias correction: only the sign counts.
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


class ReferenceLion:
    """Lion on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.betas = lr, betas
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.t = 0
        self.exp_avg = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        b1, b2 = self.betas
        U = torch.sign(b1 * self.exp_avg + (1 - b1) * G)
        self.exp_avg = b2 * self.exp_avg + (1 - b2) * G
        return W - self.lr * U
