"""SGD and Adam on the oblique manifold: matrices whose columns (dim 0) or rows (dim 1) have norm r.

For each column w of the weight, with the direction b of SGD with momentum (B <- mu B + G) or of Adam:

    u = b - w (w . b)           w <- (k r w - lr u) / |k r w - lr u|

and the weight is r w; r is 1, or the root of the column's length. k is the weight decay's factor. The steepest ones
take r u / |u| for u. Boumal, 2023, An Introduction to Optimization on Smooth Manifolds.
"""

from typing import Any

import torch
from torch import Tensor

from .adamw import adam_direction
from .weight_decay import decay_gradient, decay_weight


class _Oblique:
    """What both share: the step along the spheres, line by line."""

    steepest = False

    def __init__(self, lr: float, weight_decay: float, weight_decay_method: str, dim: int, scale_mode: str) -> None:
        self.lr, self.dim, self.scale_mode = lr, dim, scale_mode
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.t = 0

    def _move(self, W: Tensor, B: Tensor) -> Tensor:
        if self.dim == 1:
            W, B = W.T, B.T
        columns, r = [], len(W) ** 0.5 if self.scale_mode == "unit_rms_norm" else 1.0
        for w, b in zip(W.T, B.T, strict=True):
            w = w / torch.sqrt((w * w).sum())
            u = b - w * (w * b).sum()
            if self.steepest:
                u = r * u / torch.sqrt((u * u).sum())
            moved = decay_weight(r * w, self.lr, self.weight_decay, self.weight_decay_method) - self.lr * u
            columns.append(r * moved / torch.sqrt((moved * moved).sum()))
        new = torch.stack(columns, dim=1)
        return new.T if self.dim == 1 else new


class ReferenceObliqueSGD(_Oblique):
    """Heavy ball on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        weight_decay_method: str = "decoupled",
        dim: int = 0,
        scale_mode: str = "unit_l2_norm",
    ) -> None:
        super().__init__(lr, weight_decay, weight_decay_method, dim, scale_mode)
        self.momentum = momentum
        self.momentum_buffer = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.momentum_buffer = torch.zeros_like(W)
        self.t += 1
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        self.momentum_buffer = self.momentum * self.momentum_buffer + G
        return self._move(W, self.momentum_buffer)


class ReferenceObliqueAdam(_Oblique):
    """Adam on one matrix in float64; `correct_bias="published"` has the root of V over 1 - b2^t."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        weight_decay_method: str = "decoupled",
        dim: int = 0,
        eps: float = 1e-8,
        correct_bias: bool | str = True,
        scale_mode: str = "unit_l2_norm",
    ) -> None:
        super().__init__(lr, weight_decay, weight_decay_method, dim, scale_mode)
        self.betas, self.eps, self.correct_bias = betas, eps, correct_bias
        self.exp_avg = self.exp_avg_sq = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.exp_avg = self.exp_avg_sq = torch.zeros_like(W)
        self.t += 1
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        B, self.exp_avg, self.exp_avg_sq = adam_direction(
            G,
            self.exp_avg,
            self.exp_avg_sq,
            self.t,
            betas=self.betas,
            eps=self.eps,
            correct_bias=bool(self.correct_bias),
        )
        if self.correct_bias == "published":
            b1, b2 = self.betas
            root = torch.sqrt(self.exp_avg_sq) / (1 - b2**self.t)
            B = self.exp_avg / (1 - b1**self.t) / (root + self.eps)
        return self._move(W, B)


class ReferenceObliqueSteepestSGD(ReferenceObliqueSGD):
    """Every column by one angle."""

    steepest = True

    def __init__(self, lr: float = 1e-3, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(lr, momentum, **{"scale_mode": "unit_rms_norm", **options})


class ReferenceObliqueSteepestAdam(ReferenceObliqueAdam):
    """Every column by one angle."""

    steepest = True

    def __init__(self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), **options: Any) -> None:
        super().__init__(lr, betas, **{"scale_mode": "unit_rms_norm", **options})
