r"""Eigenbases of a matrix's two Kronecker factors: whitening in them, and how they follow their factors.

L (B, M, M) belongs to the rows of a gradient G (B, M, N), R (B, N, N) to its columns. K is either of them, Q its basis
and :math:`\lambda = \mathrm{diag}(Q^\top K Q)` its eigenvalues. A side that is None is left alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.kronecker import conjugate_diagonal, project_in
from emerging_optimizers.linalg.orthogonal_iteration import iterate
from emerging_optimizers.linalg.precision import fp32_matmul_precision


def floored(values_BN: Tensor, eps: float, share: float = 0.0, empty_B1: Tensor | None = None) -> Tensor:
    r"""Eigenvalues that one may divide by: :math:`\max(\lambda, \epsilon, f \bar\lambda)`, (B, N).

    Args:
        values_BN: of a positive semi-definite factor.
        eps: the least that counts.
        share: f, of their mean.
        empty_B1: what all of them are where the factor is still empty; None: they stay zero.

    Example:
        >>> floored(torch.tensor([[3.0, 1.0, 0.0]]), eps=1e-8, share=0.3)
        tensor([[3.0000, 1.0000, 0.4000]])
    """
    mean_B1 = values_BN.mean(dim=-1, keepdim=True)
    if empty_B1 is not None:
        values_BN = torch.where(mean_B1 == 0, empty_B1, values_BN)
    return torch.maximum(values_BN, (mean_B1 * share).clamp_min(eps))


def whiten(
    x_BMN: Tensor, Q_L: Tensor | None, Q_R: Tensor | None, roots_L: Tensor | None, roots_R: Tensor | None
) -> Tensor:
    r""":math:`\Lambda_L^{-1/2} Q_L^\top X Q_R \Lambda_R^{-1/2}`, (B, M, N); roots are the diagonals of the powers."""
    x_BMN = project_in(x_BMN, Q_L, Q_R)
    if roots_L is not None:
        x_BMN = x_BMN * roots_L.unsqueeze(-1)
    return x_BMN if roots_R is None else x_BMN * roots_R.unsqueeze(-2)


def kl_sides(
    grad_BMN: Tensor, Q_L: Tensor | None, Q_R: Tensor | None, roots_L: Tensor | None, roots_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""What KL-Shampoo's factors see of a gradient, each whitened by the other one: X for L and Y for R.

    .. math::
        X = G Q_R \Lambda_R^{-1/2} / \sqrt N, \qquad Y = \Lambda_L^{-1/2} Q_L^\top G / \sqrt M

    so that :math:`X X^\top = G R^{-1} G^\top / N` and :math:`Y^\top Y = G^\top L^{-1} G / M`, both (B, M, N).

    References:
        Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization,
        arXiv 2509.03378.
    """
    M, N = grad_BMN.shape[-2:]
    left_BMN = whiten(grad_BMN, None, Q_R, None, roots_R) * N**-0.5
    right_BMN = whiten(grad_BMN, Q_L, None, roots_L, None) * M**-0.5
    return left_BMN, right_BMN


def eigenvalues(factor: Tensor | None, basis: Tensor | None) -> Tensor | None:
    """diag Q^T K Q, (B, N); TF32 would be wrong by 1e-4 of the largest one, in all of them."""
    if factor is None or basis is None:
        return None
    with fp32_matmul_precision("highest"):
        return conjugate_diagonal(factor, basis)


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., N) in descending order and basis of one factor or a stack, (..., N, N), by eigh."""
    values, basis = eigh_descending(factor.reshape(-1, *factor.shape[-2:]))
    return values.view(factor.shape[:-1]), basis.view(factor.shape)


class Followed(NamedTuple):
    """One side of a refresh; all None where a side is not preconditioned."""

    basis: Tensor | None = None  # B N N
    rotation: Tensor | None = None  # B N N, from the old basis
    eigvals: Tensor | None = None  # B N, where asked for


def follow(
    factor: Tensor | None,
    basis: Tensor | None,
    *,
    steps: int | None,
    wanted: Tensor | None = None,
    with_eigenvalues: bool = False,
    exact: bool = False,
    may_wait: bool = True,
) -> Followed:
    """A factor's next eigenbasis, columns by falling eigenvalue.

    Args:
        factor: (B, N, N), positive semi-definite.
        basis: (B, N, N), the one so far.
        steps: of orthogonal iteration from there; None: eigh.
        wanted: (B, 1, 1), where there is to be a new one. Elsewhere iteration keeps the old one; eigh gives identity.
        with_eigenvalues: also find those of the factor in the new basis.
        exact: form them as a product where eigh's own might be too inexact, which are wrong by up to 5e-7 of the
            largest one (small ones of a product: 1e-8).
        may_wait: let the host look for matrices to which `cholesky_qr` does not apply.
    """
    if factor is None or basis is None:
        return Followed()
    if steps is None:
        values, new = eigh_descending(factor, wanted)
        rotation = _rotation(basis, new)
        known = None if exact else values
    else:
        found = iterate(factor, basis, steps, wanted=wanted, crosses=with_eigenvalues, may_wait=may_wait)
        new = found.basis
        rotation = _rotation(basis, new)
        known = found.eigenvalues(rotation)
        if known is not None and wanted is not None:
            known = torch.where(wanted.squeeze(-1), known, found.quotients)
    if not with_eigenvalues:
        return Followed(new, rotation)
    return Followed(new, rotation, eigenvalues(factor, new) if known is None else known)


def _rotation(old: Tensor, new: Tensor) -> Tensor:
    """From the old basis into the new one; what TF32 would round away here leaks from a spike into every entry."""
    with fp32_matmul_precision("highest"):
        return old.mT @ new


def in_order(x_BMN: Tensor, factor: Tensor | None, basis: Tensor | None, dim: int) -> Tensor:
    """Rows (dim -2) or columns (-1) in the order in which `orthogonal_iteration` takes up the basis's columns."""
    if factor is None or basis is None:
        return x_BMN
    order_BN = conjugate_diagonal(factor, basis).argsort(dim=-1, descending=True)
    return torch.take_along_dim(x_BMN, order_BN.unsqueeze(-1 if dim == -2 else -2), dim=dim)
