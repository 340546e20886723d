"""Measures of stacks: (P, ...) -> (P,), of matrices (P, b, M, N) -> (P, b)."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Rounds of power iteration. The stable rank comes out exact where one direction dominates, and at most 1.3 times too
# large for random and orthogonalized matrices of up to 512 x 128, whose largest singular values are close together.
POWER_STEPS = 8


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def norm(x: Tensor) -> Tensor:
    """Over all but the first axis."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Over all but the first axis."""
    return (x * y).flatten(1).sum(dim=1)


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y; x where y is zero, since then x is zero too."""
    return x / torch.where(y == 0, 1, y)


def guarded(grad: Tensor, limits: Sequence[Tensor | None]) -> Tensor:
    """The gradients as the spike guard let them through: its units are matrices, or parameters."""
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        return grad
    limit = torch.stack(known)
    units = grad.reshape(*limit.shape, -1)
    norm = torch.linalg.vector_norm(units, dim=-1)
    factor = torch.where(norm > limit, limit / norm, 1)
    return (units * factor.unsqueeze(-1)).reshape(grad.shape)


def stable_rank(unit: Tensor) -> Tensor:
    """Of matrices with norm 1, or 0; from below the spectral norm, so from above the rank."""
    # Random, since a vector of ones can be orthogonal to what is sought; its own generator leaves training's alone.
    start = torch.randn(
        unit.size(-1), 1, generator=torch.Generator("cpu").manual_seed(0), dtype=unit.dtype, device="cpu"
    )
    v = start.to(unit.device, non_blocking=True)
    for _ in range(POWER_STEPS):
        v = unit.mT @ (unit @ v)
        v = ratio(v, torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True))
    top = torch.linalg.vector_norm(unit @ v, dim=(-2, -1)).square()
    return ratio(torch.ones_like(top), top) * (top > 0)


def ns_residual(unit: Tensor) -> Tensor:
    """How far X X^T is from the identity, for X of norm 1 scaled to the norm of orthonormal rows."""
    x = unit if unit.size(-2) <= unit.size(-1) else unit.mT
    m = x.size(-2)
    distance = m * (x @ x.mT) - torch.eye(m, dtype=x.dtype, device=x.device)
    return torch.linalg.vector_norm(distance, dim=(-2, -1)) / m**0.5
