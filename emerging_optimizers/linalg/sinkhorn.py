"""Rows and columns scaled in turn: the Sinkhorn-Knopp map to doubly stochastic matrices, and the same with norms."""

from math import sqrt

import torch
from torch import Tensor

from emerging_optimizers.linalg.precision import fp32_matmul_precision
from emerging_optimizers.linalg.scaling import unit_norm


def sinkhorn(x_BMN: Tensor, num_iters: int = 20, eps: float = 1e-8) -> Tensor:
    r"""Alternately scales the columns and rows of :math:`\exp(X)`, until both have the sums that they should have.

    .. math::
        Y \leftarrow \exp(X - \max X), \qquad
        Y_{ij} \leftarrow c \, Y_{ij} / \textstyle\sum_k Y_{kj}, \qquad
        Y_{ij} \leftarrow r \, Y_{ij} / \textstyle\sum_k Y_{ik}

    for X of shape (..., M, N). Columns sum to c = max(1, M / N) and rows to r = max(1, N / M), so that a square Y is
    doubly stochastic.

    Args:
        x_BMN: (..., M, N). Not modified.
        num_iters: how often columns and then rows are scaled.
        eps: smaller sums count as this.

    References:
        Sinkhorn and Knopp 1967, Concerning Nonnegative Matrices and Doubly Stochastic Matrices.
        Peyré and Cuturi 2019, Computational Optimal Transport, chapter 4, arXiv 1803.00567.

    Example:
        >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).sum(dim=0)
        tensor([1., 1.])
    """
    # Of each matrix: with the maximum of a whole stack a small matrix in it would underflow.
    y = torch.exp(x_BMN - x_BMN.amax(dim=(-2, -1), keepdim=True))
    columns, rows = sums(*x_BMN.shape[-2:])
    for _ in range(num_iters):
        y = y * (columns / y.sum(dim=-2, keepdim=True).clamp_min(eps))
        y = y * (rows / y.sum(dim=-1, keepdim=True).clamp_min(eps))
    return y


def sums(m: int, n: int) -> tuple[float, float]:
    """What each column and each row of an (M, N) matrix sums to.

    Example:
        >>> sums(4, 2)
        (2.0, 1.0)
    """
    return max(1.0, m / n), max(1.0, n / m)


def balance(x_BMN: Tensor, num_steps: int = 11, zero_row_threshold: float = 1e-3, eps: float = 1e-20) -> Tensor:
    r"""Rows and columns of X divided by their norms in turn, so that both come to have entries with an RMS of 1.

    .. math::
        X_i \leftarrow 0 \;\text{ where }\; \|X_i\| \le \tau \, \mathrm{mean}_k \|X_k\|, \qquad
        X_i \leftarrow X_i / \|X_i\|, \quad X_{\cdot j} \leftarrow X_{\cdot j} / \|X_{\cdot j}\|, \quad \ldots

    and the result times :math:`\sqrt N`. With an odd number of steps the rows are last, and their RMS is 1, or 0. The
    squares of the norms are all that changes, by one product of a matrix and a vector a step: Sinkhorn-Knopp on X o X.

    Args:
        x_BMN: (..., M, N). Not modified.
        num_steps: divisions, of rows and of columns together, >= 1.
        zero_row_threshold: tau.
        eps: rows whose norm is smaller are divided by this.

    References:
        DeepSeek-AI 2026, DeepSeek-V4.1 technical report, algorithm 1.
        Scetbon et al. 2025, Gradient Multi-Normalization for Stateless and Scalable LLM Training, arXiv 2502.06742.

    Example:
        >>> balance(torch.tensor([[3.0, -4.0], [0.0, 0.1], [0.0, 0.0]]), num_steps=1)
        tensor([[ 0.8485, -1.1314],
                [ 0.0000,  1.4142],
                [ 0.0000,  0.0000]])
    """
    norms = torch.linalg.vector_norm(x_BMN, dim=-1, keepdim=True)
    x = x_BMN.masked_fill(norms <= zero_row_threshold * norms.mean(dim=-2, keepdim=True), 0)
    x = unit_norm(x, dim=-1, eps=eps)
    squares, least = x.square(), torch.finfo(x.dtype).tiny  # by which a line of zeros stays one
    rows_BM1 = torch.ones_like(x[..., :1])
    columns_BN1 = torch.ones_like(x[..., :1, :]).mT
    with fp32_matmul_precision("highest"):
        for step in range(1, num_steps):
            if step % 2:
                columns_BN1 = (squares.mT @ rows_BM1).clamp_min(least).reciprocal()
            else:
                rows_BM1 = (squares @ columns_BN1).clamp_min(least).reciprocal()
    return x * rows_BM1.sqrt() * (columns_BN1.mT.sqrt() * sqrt(x_BMN.size(-1)))
