"""The leading singular value of a stack of matrices, by power iteration."""

import torch
from torch import Tensor


def power_iteration(w_BMN: Tensor, u_BM: Tensor, steps: int = 1, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor]:
    r"""Leading singular value (B,), left (B, M) and right (B, N) singular vector of each matrix.

    .. math::
        v \leftarrow W^\top u / \|W^\top u\|, \qquad u \leftarrow W v / \|W v\|, \qquad
        \sigma = u^\top W v \quad\text{with}\quad v = W^\top u / \|W^\top u\|

    `steps` times, from a start that need not be normalised. :math:`\sigma` never exceeds the leading singular value,
    and its relative error is of second order in that of u: with a gap between the first two singular values it falls
    by :math:`(\sigma_2 / \sigma_1)^4` a step.

    A vector that W maps to zero (every vector does, of a zero matrix) is kept instead of becoming zero, so that the
    iteration goes on once the matrix is no longer zero.

    Source: Golub and Van Loan, Matrix Computations, section 8.2.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 1.0]))[None]
        >>> sigma, u, v = power_iteration(w, torch.ones(1, 2), steps=10)
        >>> sigma
        tensor([3.])
    """
    w = w_BMN
    u = u_BM.unsqueeze(-1)
    u = u / _norm(u).clamp_min(eps)
    for _ in range(steps):
        ahead = w @ _unit(w.mT @ u, eps)
        length = _norm(ahead)
        u = torch.where(length > 0, ahead / length.clamp_min(eps), u)
    back = w.mT @ u
    v = _unit(back, eps)
    sigma = torch.sum(back * v, dim=-2)  # u^T W v
    return sigma.squeeze(-1), u.squeeze(-1), v.squeeze(-1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-2, keepdim=True)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / _norm(x).clamp_min(eps)
