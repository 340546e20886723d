"""Symmetric eigendecomposition of a stack, in descending order, where one bad row stays in its row."""

import torch
from torch import Tensor

from emerging_optimizers.linalg.factorizations import diagonal_and_identity, factorized


def eigh_descending(k_BNN: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues (B, N) in descending order and eigenvectors (B, N, N) as columns, :math:`K = Q \Lambda Q^\top`.

    The stack is decomposed in one call. A row that fails is taken alone in float64 (`factorizations.factorized`); if it
    still fails (it is not finite), or is not `wanted` (B, 1, 1), it returns its diagonal and the identity, and the
    others are untouched.

    Example:
        >>> values, vectors = eigh_descending(torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None])
        >>> values
        tensor([[3., 2., 1.]])
    """
    values, vectors = factorized("eigh", k_BNN)
    if wanted is None:
        return values, vectors
    diagonal, identity = diagonal_and_identity(k_BNN)
    return torch.where(wanted.squeeze(-1), values, diagonal), torch.where(wanted, vectors, identity)
