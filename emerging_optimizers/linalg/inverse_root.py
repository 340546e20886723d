"""Inverse roots of symmetric positive semi-definite matrices, (..., N, N)."""

import torch
from torch import Tensor

from emerging_optimizers.linalg.eigh import eigh_descending

# Grishina et al. 2025, CANS, arXiv 2506.10935: (beta, alpha) of ten steps, made for eigenvalues in (0, 1.01].
CANS_INVERSE_SQRT = (
    (5.182503604966906, -5.126830178299687),
    (2.586120737395915, -0.641538812403133),
    (2.567364126726186, -0.6391058222170474),
    (2.520560084348265, -0.6330225823828756),
    (2.410759275435182, -0.6186815444268036),
    (2.1883348130094173, -0.5893091162177136),
    (1.8595760874873613, -0.5449991062102938),
    (1.589020160467417, -0.5075811685214573),
    (1.5051653981684994, -0.4957799077972079),
    (1.4925557853149838, -0.49259266842078675),
)


def inverse_root(k_BNN: Tensor, p: float, eps: float) -> Tensor:
    r"""The damped inverse p-th root, (B, N, N).

    .. math:: Q \, \frac{\Lambda^{1/p}}{\Lambda^{2/p} + \epsilon^{2/p}} \, Q^\top
        \quad\text{for}\quad K = Q \Lambda Q^\top

    At most :math:`\epsilon^{-1/p} / 2`, for the eigenvalue `eps`; smaller ones fade out, and zero gives zero.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([16.0, 0.0]))[None], p=4, eps=1e-8)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.0000]]])
    """
    return root_of_eigen(*eigh_descending(k_BNN), p, eps)


def root_of_eigen(values: Tensor, vectors: Tensor, p: float, eps: float) -> Tensor:
    """The same of a matrix whose eigenvalues (B, N) and eigenvectors (B, N, N) are known."""
    root = values.clamp_min(0) ** (1 / p)  # rounding turns a zero eigenvalue negative
    return (vectors * (root / (root.square() + eps ** (2 / p))).unsqueeze(-2)) @ vectors.mT


def inverse_sqrt_eigh(x: Tensor, eps: float = 1e-12) -> Tensor:
    r"""The inverse square root with eigenvalues floored at `eps`: :math:`Q \max(\Lambda, \epsilon)^{-1/2} Q^\top`.

    Args:
        x: (N, N) or (B, N, N), symmetric.
        eps: floor of the eigenvalues, > 0.

    Returns:
        A tensor like `x`.

    Example:
        >>> inverse_sqrt_eigh(torch.diag(torch.tensor([4.0, 1.0])))
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp_min(eps).rsqrt().unsqueeze(-2)) @ vectors.mT


def inverse_sqrt_cans(x: Tensor, eps: float = 1e-12) -> Tensor:
    r"""The inverse square root by ten steps of a coupled Newton-Schulz iteration: matrix products only.

    .. math::
        Y_0 = X / \|X\|_\infty, \quad Z_0 = I, \qquad P = Z Y, \quad
        Z \leftarrow \beta Z + \alpha P Z, \quad Y \leftarrow \beta Y + \alpha Y P

    The result is :math:`Z / \sqrt{\|X\|_\infty}`, made symmetric; :math:`\|X\|_\infty` bounds the largest eigenvalue.
    Float32 matmul precision has to be "high" or "highest".

    Args:
        x: (N, N) or (B, N, N), symmetric positive definite, float32 or float64.
        eps: floor of the norm.

    Returns:
        A tensor like `x`.

    Raises:
        TypeError: `x` is not square, or in a shorter dtype.
        RuntimeError: float32 products are made in bfloat16.

    Example:
        >>> inverse_sqrt_cans(torch.diag(torch.tensor([4.0, 1.0]))).diagonal()
        tensor([0.5000, 1.0000])
    """
    return _coupled(x, eps)[1]


def inverse_fourth_root_cans(x: Tensor, eps: float = 1e-12) -> Tensor:
    r"""The inverse fourth root by the same iteration, twice: :math:`(X^{1/2})^{-1/2}`, 60 matrix products.

    The first gives :math:`X^{1/2}` along with its inverse. Relative error in float32, 128 x 128: 2e-5 for eigenvalues
    within a factor of 1e4, 1e-4 within 1e5, 2e-3 within 1e6; beyond that the roots of the smallest are too small.

    Args:
        x: (N, N) or (B, N, N), symmetric positive definite, float32 or float64.
        eps: floor of the norm.

    Returns:
        A tensor like `x`.

    Raises:
        TypeError: as for `inverse_sqrt_cans`.
        RuntimeError: as for `inverse_sqrt_cans`.

    Example:
        >>> inverse_fourth_root_cans(torch.diag(torch.tensor([16.0, 1.0]))).diagonal()
        tensor([0.5000, 1.0000])
    """
    return _coupled(_coupled(x, eps)[0], eps)[1]


def _coupled(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The square root and its inverse."""
    if x.ndim not in (2, 3) or x.size(-2) != x.size(-1) or x.size(-1) == 0:
        raise TypeError(f"x has shape {tuple(x.shape)}; give one square matrix (N, N) or a stack of them (B, N, N)")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}; give float32 or float64, x.float() for instance")
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
        raise RuntimeError(
            "float32 matmul precision is 'medium', in which this iteration does not converge; "
            "use torch.set_float32_matmul_precision with 'high' or 'highest'"
        )
    norm = x.abs().sum(dim=-1).amax(dim=-1)[..., None, None].clamp_min(eps)
    y = x / norm
    z = torch.eye(x.size(-1), dtype=x.dtype, device=x.device).expand_as(x)
    for beta, alpha in CANS_INVERSE_SQRT:
        p = z @ y
        z, y = beta * z + alpha * (p @ z), beta * y + alpha * (y @ p)
    return (y + y.mT) * (0.5 * norm.sqrt()), (z + z.mT) * (0.5 * norm.rsqrt())
