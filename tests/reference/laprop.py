"""LaProp: Adam with its two averages taken apart; normalise first, then average.

    V_t = b2 V + (1 - b2) G^2        M_t = b1 M + (1 - b1) G / (sqrt(V_t / (1 - b2^t)) + eps)
    W <- W - lr M_t / (1 - b1^t)

Ziyin, Wang and Ueda, 2020, arXiv 2002.04839.
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


class ReferenceLaProp:
    """LaProp on one matrix in float64; ``frob_normalize`` keeps the norm that the weight had before."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        frob_normalize: bool = False,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.correct_bias, self.frob_normalize = correct_bias, frob_normalize
        self.t = 0
        self.exp_avg = torch.zeros(0)
        self.exp_avg_sq = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
        self.t += 1
        norm_before = float(torch.sqrt((W * W).sum()))

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)

        b1, b2 = self.betas
        unbias1 = 1 - b1**self.t if self.correct_bias else 1.0
        unbias2 = 1 - b2**self.t if self.correct_bias else 1.0
        self.exp_avg_sq = b2 * self.exp_avg_sq + (1 - b2) * G * G
        whitened = G / (torch.sqrt(self.exp_avg_sq / unbias2) + self.eps)
        self.exp_avg = b1 * self.exp_avg + (1 - b1) * whitened
        W = W - self.lr * self.exp_avg / unbias1

        if self.frob_normalize:
            norm_after = float(torch.sqrt((W * W).sum()))
            W = W * (norm_before / max(norm_after, self.eps))
        return W
