"""`linalg.sinkhorn.balance` under its published name."""

import torch
from torch import Tensor

from emerging_optimizers.engine.options import COUNT, NON_NEGATIVE, POSITIVE
from emerging_optimizers.linalg.sinkhorn import balance

__all__ = ["sinkhorn_balance"]


@torch.no_grad()
def sinkhorn_balance(
    update: Tensor, *, eps: float = 1e-20, num_normalization_steps: int = 11, zero_row_threshold: float = 1e-3
) -> Tensor:
    """Divide the rows and the columns of a matrix by their norms in turn, and make the RMS of each row 1.

    It will do as `scaled_orthogonalize_fn` of an `OrthogonalizedOptimizer`; `Sinkhorn` is an optimizer of its own.

    Args:
        update: (M, N) or a stack. Not modified.
        eps: smaller norms count as this, > 0.
        num_normalization_steps: divisions, an odd number >= 1, so that rows are the last.
        zero_row_threshold: rows are set to zero whose norm is at most this share of the mean norm, >= 0.

    Returns:
        A tensor like `update`, computed in at least float32.

    Raises:
        ValueError: not a matrix, one without entries, or a value out of its range.

    Example:
        >>> sinkhorn_balance(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), num_normalization_steps=1)
        tensor([[0.8485, 1.1314],
                [0.0000, 1.4142]])
    """
    if update.ndim < 2 or update.numel() == 0 or not update.is_floating_point():
        raise ValueError(
            "sinkhorn_balance takes matrices of floating-point numbers, with entries; update is "
            f"{update.dtype} of shape {tuple(update.shape)}"
        )
    if not (COUNT.holds(num_normalization_steps) and num_normalization_steps % 2):
        raise ValueError(
            f"num_normalization_steps={num_normalization_steps!r} is not allowed; give an odd integer >= 1"
        )
    if not POSITIVE.holds(eps):
        raise ValueError(f"eps={eps!r} is not allowed; give {POSITIVE.allowed}")
    if not NON_NEGATIVE.holds(zero_row_threshold):
        raise ValueError(f"zero_row_threshold={zero_row_threshold!r} is not allowed; give {NON_NEGATIVE.allowed}")
    x = update if update.dtype == torch.float64 else update.float()
    return balance(x, num_normalization_steps, zero_row_threshold, eps).to(update.dtype)
