"""A rotation that brings a stack of matrices nearer to symmetric and positive: online orthogonal Procrustes."""

from typing import Literal

import torch
from torch import Tensor

from emerging_optimizers.linalg.power_iteration import norm_lower_bound


def procrustes_step(
    q_BNN: Tensor, v_BKN: Tensor, max_step_size: float = 0.125, eps: float = 1e-8, order: Literal[2, 3] = 2
) -> Tensor:
    r"""One step towards :math:`\min_U \|U Q - I\|_F` over orthogonal U, which symmetric positive U Q solve.

    .. math::
        R = \frac{Q^\top - Q}{\|Q^\top - Q\|_2}, \qquad
        Q \leftarrow \Big(I + a R + \frac{a^2}{2} R^2 \; \Big[ + \frac{a^3}{8} R^3 \Big] \Big) Q \approx \exp(a R)\, Q

    with the step a that maximises the trace of the result, up to `max_step_size`.

    Args:
        q_BNN: (B, N, N).
        v_BKN: (B, K, N), random rows for `norm_lower_bound`, which estimates the norm.
        max_step_size: largest a; below 1/4 for order 2 and 5/8 for order 3 the expansion holds.
        eps: lower bound of the norm that divides.
        order: of the expansion.

    References:
        Li 2024, Stochastic Hessian Fittings with Lie Groups, arXiv 2402.11858; his psgd_torch for the expansions.

    Example:
        >>> q = torch.tensor([[[1.0, -0.1], [0.1, 1.0]]])
        >>> step = procrustes_step(q, torch.ones(1, 1, 2))
        >>> (step - step.mT).abs().max() < 1e-2
        tensor(True)
    """
    skew = q_BNN.mT - q_BNN
    skew = skew / norm_lower_bound(skew, v_BKN, eps=eps).clamp_min(eps).view(-1, 1, 1)
    once = skew @ q_BNN
    twice = skew @ once
    first, second = _trace(skew, q_BNN), _trace(skew, once)  # first >= 0: it is half of ||Q^T - Q||^2 / ||Q^T - Q||_2
    if order == 2:
        best = (-first / second).clamp(0, max_step_size)
        a = torch.where(second < 0, best, max_step_size)  # a convex trace grows without end
        return q_BNN + a * (once + a / 2 * twice)
    thrice = skew @ twice
    third = _trace(skew, twice)
    # Where first + second a + 3/8 third a^2 vanishes, with the square root below: near a symmetric matrix, where first
    # vanishes too, the usual form is a difference of two equal numbers, and the step their rounding.
    best = 2 * first / ((second.square() - 1.5 * first * third).sqrt() - second)
    a = torch.where(first > 0, best.clamp_max(max_step_size), 0)  # a symmetric matrix has no rotation to make
    return q_BNN + a * (once + a / 2 * (twice + a / 4 * thrice))


def _trace(a_BNN: Tensor, b_BNN: Tensor) -> Tensor:
    """Of the product, (B, 1, 1), without forming it."""
    return torch.sum(a_BNN * b_BNN.mT, dim=(-2, -1), keepdim=True)
