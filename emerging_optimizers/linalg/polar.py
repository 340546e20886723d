r"""The polar factor :math:`U V^\top` of :math:`X = U S V^\top`, for a stack of matrices, to working accuracy.

Two routes, for when Newton-Schulz is not close enough (`newton_schulz.py` has the routes by products alone). A zero
matrix has the polar factor zero.
"""

from functools import cache
from math import sqrt

import torch
from torch import Tensor

from emerging_optimizers.linalg.factorizations import factorized


def polar_svd(x_BMN: Tensor) -> Tensor:
    """The polar factor by a singular value decomposition: exact, slow on an accelerator.

    Args:
        x_BMN: (B, M, N), float32 or float64. A matrix that is not finite becomes NaN, the others do not mind.

    Returns:
        (B, M, N); singular values up to max(M, N) eps times the largest become 0, all others 1.

    Example:
        >>> polar_svd(torch.diag(torch.tensor([3.0, -0.1]))[None]).round(decimals=3)
        tensor([[[ 1.,  0.],
                 [ 0., -1.]]])
    """
    U, s, Vh = factorized("svd", x_BMN)
    limit = s[..., :1] * (max(x_BMN.shape[-2:]) * torch.finfo(s.dtype).eps)
    return (U * (s > limit).unsqueeze(-2)) @ Vh


def polar_qdwh(x_BMN: Tensor) -> Tensor:
    r"""The polar factor by QDWH, the QR-based dynamically weighted Halley iteration.

    .. math::
        X_0 = X / \|X\|_F, \qquad X_{k+1} = X_k (a_k I + b_k X_k^\top X_k)(I + c_k X_k^\top X_k)^{-1}

    The weights are optimal for singular values in [l, 1] with l = eps, so they are the same for every matrix and the
    number of steps is known (five in float32, six in float64). Steps with large c go through a QR factorization, as in
    the paper, the others through a Cholesky factorization.

    Args:
        x_BMN: (B, M, N), float32 or float64.

    Returns:
        (B, M, N); singular values above eps times the Frobenius norm end at 1 up to rounding. Smaller ones are rounding
        noise and end anywhere in [0, 1]; `polar_svd` drops them.

    References:
        Nakatsukasa, Bai and Gygi 2010, Optimizing Halley's iteration for computing the matrix polar decomposition.

    Example:
        >>> polar_qdwh(torch.diag(torch.tensor([3.0, -0.1]))[None]).round(decimals=3)
        tensor([[[ 1.,  0.],
                 [ 0., -1.]]])
    """
    wide = x_BMN.size(-2) < x_BMN.size(-1)
    x = x_BMN.mT if wide else x_BMN
    peak = x.abs().amax(dim=(-2, -1), keepdim=True)
    x = x / torch.where(peak > 0, peak, 1)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1)
    identity = torch.eye(x.size(-1), dtype=x.dtype, device=x.device)
    for a, b, c in _halley_weights(torch.finfo(x.dtype).eps):
        if c > _QR_ABOVE:
            stacked = torch.cat([sqrt(c) * x, identity.expand(x.size(0), -1, -1)], dim=-2)
            Q = factorized("qr", stacked)[0]
            Q1, Q2 = Q[:, : x.size(-2)], Q[:, x.size(-2) :]
            inverse = Q1 @ Q2.mT / sqrt(c)
        else:
            (L,) = factorized("cholesky", identity + c * (x.mT @ x))
            inverse = torch.cholesky_solve(x.mT, L).mT
        x = (b / c) * x + (a - b / c) * inverse
    return x.mT if wide else x


# Below this weight I + c X'X is so well conditioned that its Cholesky factor loses nothing (the paper's value).
_QR_ABOVE = 100.0


@cache
def _halley_weights(low: float) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each step until every value of [low, 1] is 1 in double precision."""
    weights = []
    while 1 - low > 1e-15:
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = sqrt(1 + d) + 0.5 * sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        weights.append((a, b, c))
        low = min(1.0, low * (a + b * low**2) / (1 + c * low**2))
    return tuple(weights)
