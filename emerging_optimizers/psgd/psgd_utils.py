"""Norm bounds and balanced factors under their published path and names."""

import torch
from torch import Tensor

from emerging_optimizers.linalg.power_iteration import norm_lower_bound
from emerging_optimizers.psgd.psgd import NORM_STARTS, balance

__all__ = ["norm_lower_bound_skew", "norm_lower_bound_spd", "uniformize_q_in_place"]


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
    return norm_lower_bound(A[None], normal_starts("A", A, k), half_iters, eps)[0]


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


def normal_starts(name: str, x: Tensor, k: int = NORM_STARTS) -> Tensor:
    """(1, k, N) normal numbers from torch's generator, for a square x."""
    if x.ndim != 2 or x.size(0) != x.size(1):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give a square matrix (N, N)")
    return torch.randn(1, k, x.size(0), dtype=x.dtype, device=x.device)
