r"""Bounds on singular values by matrix products alone, without an SVD.

With :math:`\mathrm{msign}(X) = U V^\top` for :math:`X = U S V^\top`, a clipped singular value is a sum of signs: for
:math:`s \ge 0`,

.. math::
    \mathrm{clip}(s, a, b) = \tfrac12 \left( a + b + (a - s) \operatorname{sign}(a - s)
        - (b - s) \operatorname{sign}(b - s) \right)

and every sign is one Newton-Schulz iteration (Polar Express, eight steps). A value within 1 % of a bound may come out
wrong by about 1 % of the distance to it; zero singular values stay zero.

References:
    Cesista 2025, Fast, Numerically Stable, and Auto-Differentiable Spectral Clipping via Newton-Schulz Iteration.
    Hanson and Pratt 1988, Comparing biases for minimal network construction with back-propagation (weight decay).
"""

import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import coefficients
from emerging_optimizers.linalg.newton_schulz import newton_schulz

_STEPS = coefficients("polar_express", 8)


def spectral_clip(X: Tensor, sigma_min: float = -1.0, sigma_max: float = 1.0) -> Tensor:
    """Replace every singular value s of every matrix by clip(s, sigma_min, sigma_max).

    Args:
        X: (M, N) or (B, M, N). Singular values that are zero stay zero, whatever `sigma_min` is.
        sigma_min: lower bound; a singular value is never negative, so below 0 it bounds nothing.
        sigma_max: upper bound, >= `sigma_min`.

    Returns:
        A tensor like X.

    Raises:
        ValueError: bounds in the wrong order, or no matrix.

    Example:
        >>> spectral_clip(torch.diag(torch.tensor([3.0, 0.5, 0.1])), 0.2, 1.0).diagonal().round(decimals=2)
        tensor([1.0000, 0.5000, 0.2000])
    """
    if not sigma_min <= sigma_max:
        raise ValueError(f"sigma_min={sigma_min} exceeds sigma_max={sigma_max}; give sigma_min <= sigma_max")
    X, shape, tall = _wide(X)
    O = _msign(X)
    square = O @ X.mT  # U S U', symmetric
    identity = torch.eye(X.size(-2), dtype=X.dtype, device=X.device)
    below, above = (_msign(bound * identity - square) @ (bound * O - X) for bound in (sigma_min, sigma_max))
    return _back(0.5 * ((sigma_min + sigma_max) * O + below - above), shape, tall)


def spectral_hardcap(X: Tensor, beta: float = 1.0) -> Tensor:
    """Replace every singular value s of every matrix by min(s, beta); one iteration less than `spectral_clip`.

    Args:
        X: (M, N) or (B, M, N).
        beta: the bound, > 0.

    Returns:
        A tensor like X.

    Raises:
        ValueError: a bound that is not positive, or no matrix.

    Example:
        >>> spectral_hardcap(torch.diag(torch.tensor([3.0, 0.5]))).diagonal().round(decimals=2)
        tensor([1.0000, 0.5000])
    """
    if not beta > 0:
        raise ValueError(f"beta={beta!r} is not allowed; give a number > 0")
    X, shape, tall = _wide(X)
    O = _msign(X)
    distance = beta * O - X
    return _back(0.5 * (beta * O + X - distance @ (_msign(distance).mT @ O)), shape, tall)


def spectral_clipped_weight_decay(X: Tensor, beta: float = 1.0, c: float = 0.5) -> Tensor:
    """Take the share c off what every singular value has above beta: (1 - c) X + c hardcap(X, beta).

    Args:
        X: (M, N) or (B, M, N), a weight.
        beta: singular values up to here do not decay, > 0.
        c: share of the excess, in [0, 1].

    Returns:
        A tensor like X.

    Raises:
        ValueError: a value out of its range, or no matrix.

    Example:
        >>> spectral_clipped_weight_decay(torch.diag(torch.tensor([3.0, 0.5]))).diagonal().round(decimals=2)
        tensor([2.0000, 0.5000])
    """
    if not 0 <= c <= 1:
        raise ValueError(f"c={c!r} is not allowed; give a number in [0, 1]")
    return torch.lerp(X, spectral_hardcap(X, beta), c)


def _msign(X: Tensor) -> Tensor:
    return newton_schulz(X, _STEPS)


def _wide(X: Tensor) -> tuple[Tensor, torch.Size, bool]:
    """As a stack of matrices with M <= N, so that the square products are the small ones."""
    if X.ndim < 2:
        raise ValueError(f"X has shape {tuple(X.shape)}; give a matrix (M, N) or a stack of them")
    tall = X.size(-2) > X.size(-1)
    stack = X.reshape(-1, *X.shape[-2:])
    return stack.mT if tall else stack, X.shape, tall


def _back(X: Tensor, shape: torch.Size, tall: bool) -> Tensor:
    return (X.mT if tall else X).reshape(shape)
