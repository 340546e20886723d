"""Muon: momentum, orthogonalised.

    M <- mu M + (1 - mu) G        N = M, or with nesterov (1 - mu) G + mu M
    W <- W - lr s f(N / ||N||_F)

Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks". f is a composition of odd
polynomials p(x) = a x + b x^3 + c x^5, and on a matrix X = U diag(sigma) V^T it acts on the singular values
alone: f(X) = U diag(f(sigma)) V^T. That is how it is evaluated here: one SVD, then scalars. The products
X X^T X ... of Newton-Schulz never occur, so this is a second route to the same matrix.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .hooks import move
from .weight_decay import decay_gradient, decay_weight

Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[str, list[Coefficients]] = {
    # Jordan et al., 2024
    "simple": [(3.4445, -4.7750, 2.0315)],
    # a tuple for every step: Cesista, You and Jordan, 2025, "Squeezing 1-2% efficiency gains out of Muon"
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    # Amsel, Persson, Musco and Gower, 2025, arXiv 2505.16932; the safety factor 1.01 is folded in
    "polar_express": [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ],
    # Grishina, Smirnov and Rakhuba, 2025, arXiv 2506.10935
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    # Boissin et al., 2025, arXiv 2512.04632
    "aol": [
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ],
    # eight steps that lift, two that settle
    "deepseekv4": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
    # cubic: one product of Gram matrices less in every step
    "cubic5": [
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ],
}

REPEAT_LAST = ("polar_express", "cans", "deepseekv4")


def schedule(
    coefficient_type: str, steps: int, custom_coefficient_sets: Sequence[Coefficients] | None = None
) -> list[Coefficients]:
    """The coefficients of each step; a set that is too short repeats its last tuple or starts again."""
    if coefficient_type == "custom":
        if not custom_coefficient_sets:
            raise ValueError("coefficient_type 'custom' needs custom_coefficient_sets")
        table = list(custom_coefficient_sets)
    elif coefficient_type in COEFFICIENTS:
        table = COEFFICIENTS[coefficient_type]
    else:
        raise ValueError(f"unknown coefficient_type {coefficient_type!r}")
    if coefficient_type == "cubic5" and steps != 5:
        raise ValueError(f"'cubic5' is made for 5 steps, not {steps}")

    chosen = []
    for k in range(steps):
        if coefficient_type in REPEAT_LAST:
            chosen.append(table[min(k, len(table) - 1)])
        else:
            chosen.append(table[k % len(table)])
    return chosen


def odd_polynomials(x: float, coefficients: Sequence[Coefficients]) -> float:
    """x -> a x + b x^3 + c x^5, once for each tuple."""
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


def orthogonalize(matrix: Tensor, coefficients: Sequence[Coefficients], eps: float = 1e-15) -> Tensor:
    """f(X / ||X||_F) through the singular value decomposition."""
    X = matrix.double()
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    norm = max(math.sqrt(sum(s * s for s in sigma.tolist())), eps)
    result = torch.zeros_like(X)
    for k, s in enumerate(sigma.tolist()):
        result += odd_polynomials(s / norm, coefficients) * torch.outer(U[:, k], Vh[k])
    return result


def polar(matrix: Tensor) -> Tensor:
    """U V^T of U S V^T, over the singular values that are not rounding noise."""
    U, sigma, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = torch.zeros_like(matrix, dtype=torch.float64)
    for k, s in enumerate(sigma.tolist()):
        if s > 1e-13 * float(sigma[0]):
            result += torch.outer(U[:, k], Vh[k])
    return result


def scale_factor(rows: int, columns: int, scale_mode: str) -> float:
    """How long the orthogonal factor is made, from the shape (out, in) of the weight."""
    if scale_mode == "spectral":
        return math.sqrt(max(rows, columns))
    if scale_mode == "shape_scaling":
        return math.sqrt(max(1.0, rows / columns))
    if scale_mode == "unit_rms_norm":
        return math.sqrt(rows / columns)
    raise ValueError(f"unknown scale_mode {scale_mode!r}")


class ReferenceMuon:
    """Muon on one matrix in float64; ``fp32_matmul_prec`` is accepted and has no meaning here."""

    def __init__(
        self,
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        nesterov: bool = False,
        weight_decay_method: str = "decoupled",
        fp32_matmul_prec: str = "medium",
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
        custom_coefficient_sets: Sequence[Coefficients] | None = None,
        orthogonalizer: str = "newton_schulz",
        weight_update_hook: Any = None,
    ) -> None:
        del fp32_matmul_prec
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.coefficients = schedule(coefficient_type, num_ns_steps, custom_coefficient_sets)
        self.scale_mode, self.extra_scale_factor = scale_mode, extra_scale_factor
        self.exact = orthogonalizer in ("qdwh", "svd")
        self.weight_update_hook = weight_update_hook
        self.t = 0
        self.momentum_buffer = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.momentum_buffer = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        decayed = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)

        mu = self.momentum
        self.momentum_buffer = mu * self.momentum_buffer + (1 - mu) * G
        N = (1 - mu) * G + mu * self.momentum_buffer if self.nesterov else self.momentum_buffer

        scale = scale_factor(W.shape[0], W.shape[1], self.scale_mode) * self.extra_scale_factor
        U = scale * (polar(N) if self.exact else orthogonalize(N, self.coefficients))
        return move(W, decayed, U, self.lr, self.weight_update_hook)
