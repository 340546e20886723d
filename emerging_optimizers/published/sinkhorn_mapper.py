"""The Sinkhorn-Knopp map under its published path and name; see `linalg.sinkhorn`."""

import torch
from torch import Tensor

from emerging_optimizers.engine.options import POSITIVE, WHOLE
from emerging_optimizers.linalg.sinkhorn import sinkhorn

__all__ = ["SinkhornMapper"]


class SinkhornMapper:
    """`linalg.sinkhorn` with settings: rows and columns of exp(X) scaled until both have the sums they should have.

    Args:
        num_iters: how often columns and then rows are scaled, >= 0.
        eps: smaller sums count as this, > 0.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> SinkhornMapper()(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).sum(dim=0)
        tensor([1., 1.])
    """

    def __init__(self, num_iters: int = 20, eps: float = 1e-8) -> None:
        if not WHOLE.holds(num_iters):
            raise ValueError(f"SinkhornMapper: num_iters={num_iters!r} is not allowed; give {WHOLE.allowed}")
        if not POSITIVE.holds(eps):
            raise ValueError(f"SinkhornMapper: eps={eps!r} is not allowed; give {POSITIVE.allowed}")
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
        y = sinkhorn(x, self.num_iters, self.eps)
        return x.copy_(y) if inplace else y
