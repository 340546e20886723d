"""Symmetric eigendecomposition of a stack, in descending order, where one bad row stays in its row."""

import torch
from torch import Tensor


def eigh_descending(k_BNN: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues (B, N) in descending order and eigenvectors (B, N, N) as columns, :math:`K = Q \Lambda Q^\top`.

    The stack is decomposed in one call. If that fails, each row is tried alone, then in float64; a row that still
    fails (it is not finite), or is not `wanted` (B, 1, 1), returns the identity and its diagonal, and the others are
    untouched.

    Example:
        >>> values, vectors = eigh_descending(torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None])
        >>> values
        tensor([[3., 2., 1.]])
    """
    try:
        values, vectors = torch.linalg.eigh(k_BNN)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        rows = [_eigh_row(k) for k in k_BNN]
        values, vectors = torch.stack([v for v, _ in rows]), torch.stack([q for _, q in rows])
    values, vectors = values.flip(-1), vectors.flip(-1)
    # LAPACK raises for some matrices that are not finite, and for others returns NaN without a word.
    sound = values.isfinite().all(dim=-1, keepdim=True)
    if wanted is not None:
        sound = sound & wanted.squeeze(-1)
    identity = torch.eye(k_BNN.size(-1), dtype=k_BNN.dtype, device=k_BNN.device)
    diagonal = k_BNN.flatten(-2)[..., :: k_BNN.size(-1) + 1]  # diagonal() warns when torch 2.13 compiles it
    return torch.where(sound, values, diagonal), torch.where(sound.unsqueeze(-1), vectors, identity)


def _eigh_row(k_NN: Tensor) -> tuple[Tensor, Tensor]:
    for dtype in (k_NN.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(k_NN.to(dtype))
        except RuntimeError:
            continue
        return values.to(k_NN.dtype), vectors.to(k_NN.dtype)
    return torch.full_like(k_NN[0], torch.nan), k_NN
