"""The best factorisation of a matrix into two thin ones, W ~ A B^T, with factors of equal length."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.linalg.factorizations import factorized
from emerging_optimizers.linalg.noise import run_seed


class BalancedFactors(NamedTuple):
    """What `balanced_factors` returns."""

    A: Tensor  # B M R
    B: Tensor  # B N R
    u_A: Tensor  # B M, leading left singular vector of A
    u_B: Tensor  # B N, of B
    lost: Tensor  # B, Frobenius norm of what the truncation leaves out, relative to the matrix's


def rank_of(m: int, n: int, rank: int, rank_ratio: float | None = None) -> int:
    """min(rank, M, N), or with a ratio the floor of its share of min(M, N), at least 1.

    Example:
        >>> rank_of(8, 6, 64), rank_of(8, 6, 64, 0.5)
        (6, 3)
    """
    return min(rank, m, n) if rank_ratio is None else max(1, math.floor(rank_ratio * min(m, n)))


def balanced_factors(w_BMN: Tensor, rank: int) -> BalancedFactors:
    r"""From the truncated singular value decomposition of each matrix:

    .. math::
        W = U \Sigma V^\top, \qquad A = U_r \Sigma_r^{1/2}, \qquad B = V_r \Sigma_r^{1/2}

    Where a singular value is zero both columns would be zero, and a product of two zeros has no gradient. There the
    column of B is zero and that of A is a random unit vector orthogonal to the others, as long as A's longest column
    (1 for a zero matrix): the product does not change, and B's gradient is not zero. A zero matrix is that case
    everywhere. The random vectors follow `noise.run_seed()` and the shape, and no generator moves.

    Example:
        >>> f = balanced_factors(torch.diag(torch.tensor([4.0, 3.0]))[None], rank=1)
        >>> (f.A @ f.B.mT).round(decimals=4), f.lost
        (tensor([[[4., 0.],
                 [0., 0.]]]), tensor([0.6000]))
    """
    M, N = w_BMN.shape[-2:]
    U, sigma, Vh = factorized("svd", w_BMN)
    lost = torch.linalg.vector_norm(sigma[:, rank:], dim=-1) / torch.linalg.vector_norm(sigma, dim=-1)
    top = sigma[:, :1]
    kept = sigma[:, :rank]
    live = (kept > top * (max(M, N) * torch.finfo(sigma.dtype).eps)).unsqueeze(-2)  # B 1 R
    U, V = U[..., :rank], Vh[:, :rank].mT

    # Live columns come first, and QR does not turn them: the others become orthogonal to them and to one another.
    U = torch.where(live, U, factorized("qr", torch.where(live, U, _noise(M, rank, like=w_BMN)))[0])
    scale = kept.sqrt().unsqueeze(-2)
    A = U * torch.where(live, scale, torch.where(top > 0, top.sqrt(), 1).unsqueeze(-2))
    B = torch.where(live, V * scale, 0)
    return BalancedFactors(A, B, U[..., 0], leading_left(B), torch.where(top[:, 0] > 0, lost, 0))


def leading_left(x_BMN: Tensor) -> Tensor:
    """The leading left singular vector of each matrix, (B, M); of a zero matrix the same random unit vector."""
    U, sigma, _ = factorized("svd", x_BMN)
    noise = _noise(x_BMN.size(-2), 1, like=x_BMN)[:, 0]
    return torch.where(sigma[:, :1] > 0, U[..., 0], noise / torch.linalg.vector_norm(noise))


def _noise(rows: int, columns: int, like: Tensor) -> Tensor:
    """Normal numbers that follow the seed and the shape alone, and move no generator."""
    generator = torch.Generator("cpu").manual_seed(run_seed() % 2**63)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu").to(like)
