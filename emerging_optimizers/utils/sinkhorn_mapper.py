"""The Sinkhorn-Knopp map from any matrix to a doubly stochastic one."""

import torch
from torch import Tensor

__all__ = ["SinkhornMapper"]


class SinkhornMapper:
    r"""Alternately scales the columns and rows of :math:`\exp(X)`, until both have the sums that they should have.

    .. math::
        Y \leftarrow \exp(X - \max X), \qquad
        Y_{ij} \leftarrow c \, Y_{ij} / \textstyle\sum_k Y_{kj}, \qquad
        Y_{ij} \leftarrow r \, Y_{ij} / \textstyle\sum_k Y_{ik}

    for X of shape (..., M, N). Columns sum to c = max(1, M / N) and rows to r = max(1, N / M), so that a square Y is
    doubly stochastic.

    Args:
        num_iters: how often columns and then rows are scaled, >= 0.
        eps: smaller sums count as this, > 0.

    Raises:
        ValueError: a value out of its range.

    References:
        Sinkhorn and Knopp 1967, Concerning Nonnegative Matrices and Doubly Stochastic Matrices.
        Peyré and Cuturi 2019, Computational Optimal Transport, chapter 4, arXiv 1803.00567.

    Example:
        >>> SinkhornMapper()(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).sum(dim=0)
        tensor([1., 1.])
    """

    def __init__(self, num_iters: int = 20, eps: float = 1e-8) -> None:
        if num_iters < 0:
            raise ValueError(f"SinkhornMapper: num_iters={num_iters!r} is not allowed; give an integer >= 0")
        if not eps > 0:
            raise ValueError(f"SinkhornMapper: eps={eps!r} is not allowed; give a number > 0")
        self.num_iters = num_iters
        self.eps = eps

    @torch.no_grad()
    def __call__(self, x: Tensor, inplace: bool = False) -> Tensor:
        """The map of a matrix or of each matrix of a stack.

        Args:
            x: (..., M, N).
            inplace: write the result into x.

        Returns:
            The scaled matrices; x itself with `inplace`.

        Raises:
            ValueError: x has fewer than two dimensions.
        """
        if x.ndim < 2:
            raise ValueError(f"SinkhornMapper maps matrices; x has shape {tuple(x.shape)}")
        y = x if inplace else x.clone()
        # Of each matrix: with the maximum of a whole stack a small matrix in it would underflow.
        y.sub_(y.amax(dim=(-2, -1), keepdim=True)).exp_()
        M, N = y.shape[-2:]
        for _ in range(self.num_iters):
            for dim, total in ((-2, max(1.0, M / N)), (-1, max(1.0, N / M))):
                y.mul_(total / y.sum(dim=dim, keepdim=True).clamp_min_(self.eps))
        return y
