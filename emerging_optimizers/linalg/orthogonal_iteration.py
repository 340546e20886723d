"""Refinement of an eigenbasis: one or more steps of orthogonal iteration."""

import torch
from torch import Tensor


def orthogonal_iteration(k_BNN: Tensor, q_BNN: Tensor, steps: int = 1) -> Tensor:
    r"""`steps` times :math:`Q \leftarrow \mathrm{qr}(K Q)`, for symmetric K (B, N, N) and orthogonal Q (B, N, N).

    Columns converge to eigenvectors in the order in which they stand, so sort them by their Rayleigh quotients
    first. Source: Golub and Van Loan, Matrix Computations, section 8.2.

    Example:
        >>> k = torch.diag(torch.tensor([3.0, 1.0]))[None]
        >>> orthogonal_iteration(k, torch.eye(2)[None]).abs()
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    for _ in range(steps):
        q_BNN = torch.linalg.qr(k_BNN @ q_BNN).Q
    return q_BNN
