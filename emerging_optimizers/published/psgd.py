"""PSGD's norm bounds, balanced factors, contractions and Procrustes step, for tensors of a caller."""

from typing import Literal

import torch
from torch import Tensor

from emerging_optimizers.engine.options import COUNT
from emerging_optimizers.linalg.power_iteration import norm_lower_bound
from emerging_optimizers.linalg.precision import fp32_matmul_precision
from emerging_optimizers.linalg.procrustes import procrustes_step as _procrustes_step
from emerging_optimizers.psgd.psgd import NORM_STARTS, balance


@torch.no_grad()
def uniformize_q_in_place(Q_list: list[Tensor]) -> None:
    """Scale factors so that all have one largest entry, the geometric mean of theirs; the Kronecker product stays.

    Args:
        Q_list: factors of any shapes, changed in place.

    Raises:
        TypeError: an empty list.

    Example:
        >>> a, b = torch.eye(2), 4 * torch.eye(3)
        >>> uniformize_q_in_place([a, b])
        >>> a.max(), b.max()
        (tensor(2.), tensor(2.))
    """
    if not Q_list:
        raise TypeError("uniformize_q_in_place: Q_list is empty; give at least one factor")
    for Q, balanced in zip(Q_list, balance([Q.reshape(1, -1) for Q in Q_list]), strict=True):
        Q.copy_(balanced.view(Q.shape))


@torch.no_grad()
def norm_lower_bound_spd(A: Tensor, k: int = 32, half_iters: int = 2, eps: float = 1e-8) -> Tensor:
    """A lower bound of the spectral norm of a symmetric positive matrix; see `linalg.power_iteration`.

    Args:
        A: (N, N).
        k: random starts, drawn from torch's generator.
        half_iters: each multiplies by A twice.
        eps: lower bound of what divides.

    Returns:
        0-D.

    Raises:
        ValueError: A is not square.

    Example:
        >>> norm_lower_bound_spd(torch.diag(torch.tensor([3.0, 1.0]))) <= 3.001
        tensor(True)
    """
    return norm_lower_bound(A[None], _normal_starts("A", A, k), half_iters, eps)[0]


def norm_lower_bound_skew(A: Tensor, k: int = 32, half_iters: int = 2, eps: float = 1e-8) -> Tensor:
    """A lower bound of the spectral norm of a skew-symmetric matrix.

    Args:
        A: (N, N).
        k: random starts, drawn from torch's generator.
        half_iters: each multiplies by A twice.
        eps: lower bound of what divides.

    Returns:
        0-D.

    Raises:
        ValueError: A is not square.

    Example:
        >>> norm_lower_bound_skew(torch.tensor([[0.0, 3.0], [-3.0, 0.0]])) <= 3.001
        tensor(True)
    """
    return norm_lower_bound_spd(A, k, half_iters, eps)


def _normal_starts(name: str, x: Tensor, k: int = NORM_STARTS) -> Tensor:
    """(1, k, N) normal numbers from torch's generator, for a square x."""
    if x.ndim != 2 or x.size(0) != x.size(1):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give a square matrix (N, N)")
    if not COUNT.holds(k):
        raise ValueError(f"k={k!r} is not allowed; give {COUNT.allowed}")
    return torch.randn(1, k, x.size(0), dtype=x.dtype, device=x.device)


@torch.no_grad()
def procrustes_step(Q: Tensor, max_step_size: float = 0.125, eps: float = 1e-8, order: Literal[2, 3] = 2) -> Tensor:
    r"""Rotate Q a step towards a symmetric positive matrix, :math:`\exp(a R)\, Q` with :math:`R \propto Q^\top - Q`.

    The products are full float32 products. The random starts of the norm's estimate come from torch's generator.

    Args:
        Q: (N, N).
        max_step_size: largest a, below 1/4 for order 2 and 5/8 for order 3.
        eps: lower bound of the norm of :math:`Q^\top - Q`.
        order: of the expansion, 2 or 3.

    Returns:
        (N, N), nearer to symmetric by one step.

    Raises:
        ValueError: another order, or a Q that is not square.

    References:
        Li 2024, Stochastic Hessian Fittings with Lie Groups, arXiv 2402.11858.

    Example:
        >>> procrustes_step(torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    if order not in (2, 3):
        raise ValueError(f"procrustes_step: order={order!r} is not allowed; give 2 or 3")
    starts = _normal_starts("Q", Q)
    with fp32_matmul_precision("highest"):
        return _procrustes_step(Q[None], starts, max_step_size, eps, order)[0]


def partial_contraction(G1: Tensor, G2: Tensor, axis: int) -> Tensor:
    r""":math:`C_{ij} = \sum G_1[\ldots, i, \ldots]\, G_2[\ldots, j, \ldots]` over all axes but one.

    Args:
        G1: (D_0, ..., D_N).
        G2: the same shape.
        axis: the one that stays.

    Returns:
        (D_axis, D_axis).

    Raises:
        ValueError: shapes that differ, or an axis that they have not.

    Example:
        >>> partial_contraction(torch.ones(2, 3), torch.ones(2, 3), axis=0)
        tensor([[3., 3.],
                [3., 3.]])
    """
    fit = G1.ndim == G2.ndim and -G1.ndim <= axis < G1.ndim
    others = [i for i in range(G1.ndim) if i != axis % G1.ndim] if fit else []
    if not fit or any(G1.size(i) != G2.size(i) for i in others):
        raise ValueError(
            f"partial_contraction: shapes {tuple(G1.shape)} and {tuple(G2.shape)} and axis={axis!r} do not go "
            "together; give two tensors of one shape and one of their axes"
        )
    return torch.tensordot(G1, G2, dims=(others, others))


def apply_kronecker_factors(Q_list: list[Tensor], X: Tensor) -> Tensor:
    r"""Each factor along its own axis: :math:`Q_0 X Q_1^\top` for a matrix.

    Args:
        Q_list: one factor for each axis of X: (D_i, D_i), or (D_i,) for a diagonal one.
        X: (D_0, ..., D_N).

    Returns:
        The shape of X.

    Raises:
        ValueError: not as many factors as axes.

    Example:
        >>> apply_kronecker_factors([torch.ones(2, 2), torch.tensor([1.0, 10.0])], torch.eye(2))
        tensor([[ 1., 10.],
                [ 1., 10.]])
    """
    if len(Q_list) != X.ndim:
        raise ValueError(
            f"apply_kronecker_factors: Q_list has {len(Q_list)} factors and X {X.ndim} dimensions; give one for each"
        )
    for axis, Q in enumerate(Q_list):
        along = X.movedim(axis, 0)
        along = torch.tensordot(Q, along, dims=1) if Q.ndim == 2 else Q.view(-1, *(1,) * (X.ndim - 1)) * along
        X = along.movedim(0, axis)
    return X


def apply_preconditioner(Q_list: list[Tensor], X: Tensor) -> Tensor:
    r"""The preconditioner :math:`P = Q^\top Q` along every axis: :math:`Q_0^\top Q_0 X Q_1^\top Q_1` for a matrix.

    Args:
        Q_list: as in `apply_kronecker_factors`.
        X: (D_0, ..., D_N).

    Returns:
        The shape of X.

    Raises:
        ValueError: not as many factors as axes.

    Example:
        >>> apply_preconditioner([2 * torch.eye(2), torch.tensor([1.0, 10.0])], torch.eye(2))
        tensor([[  4.,   0.],
                [  0., 400.]])
    """
    return apply_kronecker_factors([Q.mT if Q.ndim == 2 else Q for Q in Q_list], apply_kronecker_factors(Q_list, X))
