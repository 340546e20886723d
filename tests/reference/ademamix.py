"""AdEMAMix and its simplified form: Adam with a slow momentum.

    F <- b1 F + (1 - b1) G      S <- b3(t) S + (1 - b3(t)) G      V <- b2 V + (1 - b2) G^2
    W <- W - lr (F / (1 - b1^t) + a(t) S) / (sqrt(V / (1 - b2^t)) + eps)

Pagliardini, Ablin and Grangier, 2024, arXiv 2409.03137: a(t) = a min(1, t / T), and over T steps the half-life of b3(t)
goes in a straight line from that of b1 to that of b3.

    M <- b(t) M + G             V <- b2 V + (1 - b2) G^2
    W <- W - lr (a G + M (1 - b(t)) / (1 - b(t)^t)) / (sqrt(V / (1 - b2^t)) + eps)

Morwani et al., 2025, arXiv 2502.02431.
"""

import math

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


def half_life(beta: float) -> float:
    """Steps after which half of a gradient's weight is left."""
    return math.log(0.5) / math.log(beta)


def warmed(t: int, start: float, end: float, steps: int | None) -> float:
    """The decay of step t."""
    if steps is None or t >= steps:
        return end
    mixed = (1 - t / steps) * half_life(start) + t / steps * half_life(end)
    return math.pow(0.5, 1 / mixed)


class ReferenceAdEMAMix:
    """AdEMAMix on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha: float = 2.0,
        correct_bias: bool = True,
        num_beta_slow_warmup_steps: int | None = None,
        num_alpha_warmup_steps: int | None = None,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.betas, self.eps, self.alpha = lr, betas, eps, alpha
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.correct_bias = correct_bias
        self.slow_steps, self.alpha_steps = num_beta_slow_warmup_steps, num_alpha_warmup_steps
        self.t = 0
        self.exp_avg_fast = self.exp_avg_slow = self.exp_avg_sq = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg_fast = self.exp_avg_slow = self.exp_avg_sq = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        b1, b2, b3 = self.betas
        b3 = warmed(self.t, b1, b3, self.slow_steps)
        alpha = self.alpha if self.alpha_steps is None else self.alpha * min(1.0, self.t / self.alpha_steps)
        self.exp_avg_fast = b1 * self.exp_avg_fast + (1 - b1) * G
        self.exp_avg_slow = b3 * self.exp_avg_slow + (1 - b3) * G
        self.exp_avg_sq = b2 * self.exp_avg_sq + (1 - b2) * G * G
        unbias1 = 1 - b1**self.t if self.correct_bias else 1.0
        unbias2 = 1 - b2**self.t if self.correct_bias else 1.0
        top = self.exp_avg_fast / unbias1 + alpha * self.exp_avg_slow
        return W - self.lr * top / (torch.sqrt(self.exp_avg_sq / unbias2) + self.eps)


class ReferenceSimplifiedAdEMAMix:
    """Simplified AdEMAMix on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9999, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        num_beta_fast_warmup_steps: int | None = None,
        min_beta_fast: float = 0.9,
        alpha: float = 2.0,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.betas, self.eps, self.alpha = lr, betas, eps, alpha
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.correct_bias = correct_bias
        self.steps, self.start = num_beta_fast_warmup_steps, min_beta_fast
        self.t = 0
        self.exp_avg = self.exp_avg_sq = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg = self.exp_avg_sq = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        b1 = warmed(self.t, self.start, self.betas[0], self.steps)
        b2 = self.betas[1]
        self.exp_avg = b1 * self.exp_avg + G
        self.exp_avg_sq = b2 * self.exp_avg_sq + (1 - b2) * G * G
        M, V = self.exp_avg, self.exp_avg_sq
        if self.correct_bias:
            M, V = M * (1 - b1) / (1 - b1**self.t), V / (1 - b2**self.t)
        return W - self.lr * (self.alpha * G + M) / (torch.sqrt(V) + self.eps)
