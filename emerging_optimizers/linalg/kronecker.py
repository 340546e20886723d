"""Kronecker-factored changes of basis: X -> Q_L^T X Q_R and back. A basis of None is the identity."""

import torch
from torch import Tensor


def project_in(x_BMN: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    r"""Into the eigenbasis: :math:`Q_L^\top X Q_R`, all (B, M, N), (B, M, M), (B, N, N)."""
    x = x_BMN if Q_L is None else Q_L.mT @ x_BMN
    return x if Q_R is None else x @ Q_R


def project_out(x_BMN: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    r"""Out of the eigenbasis: :math:`Q_L X Q_R^\top`, the inverse of `project_in` for orthogonal bases."""
    x = x_BMN if Q_L is None else Q_L @ x_BMN
    return x if Q_R is None else x @ Q_R.mT


def conjugate_diagonal(k_BNN: Tensor, q_BNN: Tensor) -> Tensor:
    r"""The diagonal of :math:`Q^\top K Q`, (B, N), without forming the product's other entries."""
    return torch.sum((k_BNN @ q_BNN) * q_BNN, dim=-2)
