"""Iso: W = U diag(s) V^T, where U and V move on their Stiefel manifolds and s stays.

    M_U <- mu M_U + G V diag(s)     M_V <- mu M_V + G^T U diag(s)     U <- R(U, -lr M_U)     V <- R(V, -lr M_V)

ISO: An RLVR-Native Optimization Stack, 2026, arXiv 2607.19331. Retractions: qr is Gram-Schmidt on X + D; polar is
Y (Y^T Y)^(-1/2) for Y = X + D; cayley is (I - A/2)^-1 (I + A/2) X for A = D X^T - X D^T. Weight decay scales s.
"""

import torch
from torch import Tensor

from .muon import orthogonalize, schedule
from .weight_decay import decay_gradient, decay_weight


def retract(X: Tensor, D: Tensor, how: str) -> Tensor:
    """From X in the direction D, back to orthonormal columns."""
    Y = X + D
    if how == "qr":
        columns: list[Tensor] = []
        for y in Y.T:
            for _ in range(2):  # once loses orthogonality to rounding
                for q in columns:
                    y = y - q * (q @ y)
            columns.append(y / torch.sqrt(y @ y))
        return torch.stack(columns, dim=1)
    if how == "newton_schulz":
        return orthogonalize(Y, schedule("polar_express", 8))
    if how == "polar":
        values, vectors = torch.linalg.eigh(Y.T @ Y)
        return Y @ vectors @ torch.diag(values**-0.5) @ vectors.T
    A = D @ X.T - X @ D.T
    eye = torch.eye(len(X), dtype=X.dtype)
    return torch.linalg.inv(eye - A / 2) @ (eye + A / 2) @ X


class ReferenceIso:
    """Iso on one matrix in float64."""

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.9,
        retraction: str = "qr",
        *,
        fp32_matmul_prec: str = "highest",
        weight_decay: float = 0.0,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.momentum, self.retraction = lr, momentum, retraction
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.t = 0
        self.u = self.sigma = self.v = self.momentum_u = self.momentum_v = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.u, self.sigma, vh = torch.linalg.svd(W, full_matrices=False)
            self.v = vh.T
            self.momentum_u, self.momentum_v = torch.zeros_like(self.u), torch.zeros_like(self.v)
        self.t += 1
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        S = torch.diag(self.sigma)
        self.momentum_u = self.momentum * self.momentum_u + G @ self.v @ S
        self.momentum_v = self.momentum * self.momentum_v + G.T @ self.u @ S
        self.u = retract(self.u, -self.lr * self.momentum_u, self.retraction)
        self.v = retract(self.v, -self.lr * self.momentum_v, self.retraction)
        self.sigma = decay_weight(self.sigma, self.lr, self.weight_decay, self.weight_decay_method)
        return self.u @ torch.diag(self.sigma) @ self.v.T
