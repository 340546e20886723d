"""Refinement of an eigenbasis: one or more steps of orthogonal iteration."""

import torch
from torch import Tensor


def orthogonal_iteration(k_BNN: Tensor, q_BNN: Tensor, steps: int = 1) -> Tensor:
    r"""`steps` times :math:`Q \leftarrow \mathrm{qr}(K Q)`, for symmetric K (B, N, N) and orthogonal Q (B, N, N).

    Columns converge to eigenvectors in the order in which they stand, so they are first sorted by their Rayleigh
    quotients, largest first. Source: Golub and Van Loan, Matrix Computations, section 8.2.

    Example:
        >>> k = torch.diag(torch.tensor([1.0, 3.0]))[None]
        >>> orthogonal_iteration(k, torch.eye(2)[None]).abs()
        tensor([[[0., 1.],
                 [1., 0.]]])
    """
    product = k_BNN @ q_BNN
    order = torch.sum(product * q_BNN, dim=-2).argsort(dim=-1, descending=True)
    q_BNN = torch.linalg.qr(product.gather(-1, order.unsqueeze(-2).expand_as(product))).Q
    for _ in range(steps - 1):
        q_BNN = torch.linalg.qr(k_BNN @ q_BNN).Q
    return q_BNN
