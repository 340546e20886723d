"""Adam with decoupled weight decay.

    M_t = b1 M + (1 - b1) G        V_t = b2 V + (1 - b2) G^2
    W <- W - lr (M_t / (1 - b1^t)) / (sqrt(V_t / (1 - b2^t)) + eps)

Kingma and Ba, 2015, arXiv 1412.6980; Loshchilov and Hutter, 2019, arXiv 1711.05101. The look-ahead form
replaces the numerator by b1 M_t / (1 - b1^(t+1)) + (1 - b1) G / (1 - b1^t) (Dozat, 2016, NAdam).
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    *,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool = True,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction at step ``t`` (counted from 1) and the two new moments."""
    b1, b2 = betas
    exp_avg = b1 * exp_avg + (1 - b1) * grad
    exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * grad * grad

    unbias1 = 1 - b1**t if correct_bias else 1.0
    unbias1_next = 1 - b1 ** (t + 1) if correct_bias else 1.0
    unbias2 = 1 - b2**t if correct_bias else 1.0

    if nesterov:
        numerator = b1 * exp_avg / unbias1_next + (1 - b1) * grad / unbias1
    else:
        numerator = exp_avg / unbias1
    return numerator / (torch.sqrt(exp_avg_sq / unbias2) + eps), exp_avg, exp_avg_sq


class ReferenceAdamW:
    """AdamW on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        weight_decay_method: str = "decoupled",
        correct_bias: bool = True,
        nesterov: bool = False,
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.correct_bias, self.nesterov = correct_bias, nesterov
        self.t = 0
        self.exp_avg = torch.zeros(0)
        self.exp_avg_sq = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        U, self.exp_avg, self.exp_avg_sq = adam_direction(
            G,
            self.exp_avg,
            self.exp_avg_sq,
            self.t,
            betas=self.betas,
            eps=self.eps,
            correct_bias=self.correct_bias,
            nesterov=self.nesterov,
        )
        return W - self.lr * U
