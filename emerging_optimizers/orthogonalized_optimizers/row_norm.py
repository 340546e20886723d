"""Rows of unit length, as a map for `OrthogonalizedOptimizer(scaled_orthogonalize_fn=row_norm_fn)`."""

from torch import Tensor

from emerging_optimizers.linalg.scaling import unit_norm


def row_norm_fn(
    grad: Tensor, *, center_rows: bool = False, eps: float = 1e-8, extra_scale_factor: float = 1.0
) -> Tensor:
    r"""Divide every row by its norm: :math:`u_i = G_i / \max(\|G_i\|, \epsilon)`.

    Args:
        grad: (M, N).
        center_rows: take the mean row off before and after, so that every column sums to zero; rows are then only
            nearly of unit length.
        eps: lower bound of the norm that divides.
        extra_scale_factor: multiplies the result.

    Returns:
        (M, N) in the input's dtype, computed in float32 or wider.

    Raises:
        ValueError: not a matrix.

    Example:
        >>> import torch
        >>> row_norm_fn(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    if grad.ndim != 2 or not grad.is_floating_point():
        raise ValueError(
            f"row_norm_fn takes one matrix, in floating point; given is {grad.dtype} of shape {tuple(grad.shape)}"
        )
    x = grad.double() if grad.element_size() == 8 else grad.float()
    if center_rows:
        x = x - x.mean(dim=0, keepdim=True)
    x = unit_norm(x, dim=-1, eps=eps) * extra_scale_factor
    if center_rows:
        x = x - x.mean(dim=0, keepdim=True)
    return x.to(grad.dtype)
