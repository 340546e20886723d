r"""Ways back to the Stiefel manifold, on which matrices have orthonormal columns: from a point X in a direction D.

=============  ========================================================================================================
qr             Q of the QR decomposition of X + D, where R has a positive diagonal
polar          the polar factor of X + D, the nearest matrix with orthonormal columns
cayley         :math:`(I - \tfrac12 A)^{-1} (I + \tfrac12 A) X` with :math:`A = D X^\top - X D^\top`, (M, M)
newton_schulz  the polar factor by matrix products alone, eight steps of Polar Express
=============  ========================================================================================================

All take stacks, (B, M, K) with K <= M. The first three leave an error of rounding, and so does the last where no
singular value of X + D is below a thousandth of its Frobenius norm; with D tangent at X none is below 1.

References:
    Absil, Mahony and Sepulchre 2008, Optimization Algorithms on Matrix Manifolds, section 4.1 (qr and polar).
    Wen and Yin 2013, A Feasible Method for Optimization with Orthogonality Constraints (cayley).
    Amsel et al. 2025, The Polar Express, arXiv 2505.16932 (newton_schulz).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import coefficients
from emerging_optimizers.linalg.factorizations import factorized
from emerging_optimizers.linalg.newton_schulz import newton_schulz

RetractionT = Literal["qr", "polar", "cayley", "newton_schulz"]


def _qr(x_BMK: Tensor, d_BMK: Tensor) -> Tensor:
    y_BMK = x_BMK + d_BMK
    Q = factorized("qr", y_BMK)[0]
    # The signs are a convention of the kernel; with a positive diagonal of R = Q^T Y, Q is continuous in D.
    diagonal_B1K = torch.sum(Q * y_BMK, dim=-2, keepdim=True)
    return torch.where(diagonal_B1K < 0, -Q, Q)


def _polar(x_BMK: Tensor, d_BMK: Tensor) -> Tensor:
    U, _, Vh = factorized("svd", x_BMK + d_BMK)
    return U @ Vh


def _cayley(x_BMK: Tensor, d_BMK: Tensor) -> Tensor:
    half_BMM = 0.5 * (d_BMK @ x_BMK.mT - x_BMK @ d_BMK.mT)
    eye_MM = torch.eye(x_BMK.size(-2), dtype=x_BMK.dtype, device=x_BMK.device)
    # I minus a skew matrix is never singular, so nobody need wait for the device to say that it is not.
    return torch.linalg.solve_ex(eye_MM - half_BMM, x_BMK + half_BMM @ x_BMK).result


def _newton_schulz(x_BMK: Tensor, d_BMK: Tensor) -> Tensor:
    return newton_schulz(x_BMK + d_BMK, coefficients("polar_express", 8))


RETRACTIONS: Mapping[RetractionT, Callable[[Tensor, Tensor], Tensor]] = {
    "qr": _qr,
    "polar": _polar,
    "cayley": _cayley,
    "newton_schulz": _newton_schulz,
}
