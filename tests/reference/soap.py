"""SOAP: Adam in the eigenbasis of Shampoo's factors.

    L <- EMA(G G^T)        R <- EMA(G^T G)        Q_L, Q_R: their eigenvectors, by falling eigenvalue
    W <- W - lr Q_L Adam(Q_L^T G Q_R) Q_R^T

Vyas et al., 2024, arXiv 2409.11321. The Kullback-Leibler form weighs each factor's Gram matrix by the inverse
of the other factor (Lin et al., 2025, arXiv 2509.03378):

    L <- EMA(G R^-1 G^T / n)        R <- EMA(G^T L^-1 G / m)

Both right-hand sides are formed from the factors and bases before the step, where

    R^-1 = sum_j q_j q_j^T / max(lam_j, eps)        lam_j = q_j^T R q_j

One step, in order: factors; bases; the first moment goes from the old basis into the new one; the gradient
(with the l2 term, which the factors never see) is turned into the basis; Adam; back; clip; decay; subtract.
With ``overlap`` the bases and both moments in them come last, so that the next step is the first to use them.
"""

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .adamw import adam_direction
from .hooks import move
from .weight_decay import decay_gradient, decay_weight


def eigenbasis(K: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, largest eigenvalue first."""
    values, vectors = torch.linalg.eigh(K)
    order = sorted(range(len(values)), key=lambda i: -float(values[i]))
    falling: Tensor = vectors[:, order]
    return falling


def orthogonal_iteration(K: Tensor, Q: Tensor, steps: int) -> Tensor:
    """Q <- the orthogonal factor of K Q, ``steps`` times."""
    for _ in range(steps):
        Q, _ = torch.linalg.qr(K @ Q)
    return Q


def rayleigh_quotients(K: Tensor, Q: Tensor) -> list[float]:
    """q^T K q for each column q of Q."""
    return [float(Q[:, i] @ K @ Q[:, i]) for i in range(Q.shape[1])]


def falling_order(K: Tensor, Q: Tensor) -> list[int]:
    """The columns of Q by falling Rayleigh quotient."""
    values = rayleigh_quotients(K, Q)
    return sorted(range(len(values)), key=lambda i: -values[i])


def floored_inverse(K: Tensor, Q: Tensor, eps: float, share: float) -> Tensor:
    """sum_j q_j q_j^T / max(q_j^T K q_j, eps, share of their mean): the inverse that the KL factor uses."""
    inverse = torch.zeros_like(K)
    values = rayleigh_quotients(K, Q)
    floor = max(eps, share * sum(values) / len(values))
    for j, value in enumerate(values):
        inverse += torch.outer(Q[:, j], Q[:, j]) / max(value, floor)
    return inverse


class ReferenceSOAP:
    """SOAP on one matrix in float64; both matmul precisions are accepted and have no meaning.

    ``first_step="eigenbasis"`` turns into the eigenbasis of the first gradient at once, and the second moment follows
    the columns of a basis. ``"adam"`` makes the first step Adam's own (identity bases), turns into a basis for the
    first time at the second step, and turns the second moment with the basis as if its entries were independent. The
    first basis is made by eigh.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
        nesterov: bool = False,
        correct_bias: bool = True,
        fp32_matmul_prec: str = "highest",
        use_eigh: bool = False,
        qr_fp32_matmul_prec: str = "high",
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        use_kl_shampoo: bool = False,
        correct_shampoo_beta_bias: bool | None = None,
        first_step: str = "adam",
        precondition_frequency: int = 1,
        refresh_ramp: int = 0,
        max_precond_dim: int = 10000,
        relative_floor: float | None = None,
        overlap: bool = False,
        weight_update_hook: Any = None,
    ) -> None:
        del fp32_matmul_prec, qr_fp32_matmul_prec
        if first_step not in ("adam", "eigenbasis"):
            raise ValueError(f"unknown first_step {first_step!r}")
        self.lr, self.betas, self.shampoo_beta, self.eps = lr, betas, shampoo_beta, eps
        self.adam_eps = eps
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.nesterov, self.correct_bias = nesterov, correct_bias
        self.use_eigh, self.power_iter_steps = use_eigh, power_iter_steps
        self.max_update_rms, self.use_kl_shampoo = max_update_rms, use_kl_shampoo
        if correct_shampoo_beta_bias is None:
            correct_shampoo_beta_bias = correct_bias
        self.correct_shampoo_beta_bias = correct_shampoo_beta_bias
        self.first_step, self.precondition_frequency = first_step, precondition_frequency
        self.refresh_ramp = refresh_ramp
        self.max_precond_dim = max_precond_dim
        self.overlap = overlap
        if relative_floor is None:
            relative_floor = 0.01 if first_step == "adam" else 0.0
        self.relative_floor = relative_floor
        self.turn = 0  # when this matrix refreshes among the others that share the frequency
        self.weight_update_hook = weight_update_hook
        self.t = 0
        self.exp_avg = torch.zeros(0)  # in the eigenbasis
        self.exp_avg_sq = torch.zeros(0)  # in the eigenbasis
        self.L: Tensor | None = None  # None: this side is too long to be preconditioned
        self.R: Tensor | None = None
        self.left_null_space: Tensor | None = None  # if set: the last columns of the first left basis
        self.Q_L = torch.zeros(0)
        self.Q_R = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        if self.t == 0:
            self.start(W)
        self.t += 1

        self.update_factors(G)
        if not self.overlap and self.refreshes_now():
            self.refresh_bases()

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        rotated, self.exp_avg, self.exp_avg_sq = adam_direction(
            self.Q_L.T @ G @ self.Q_R,
            self.exp_avg,
            self.exp_avg_sq,
            self.t,
            betas=self.betas,
            eps=self.adam_eps,
            correct_bias=self.correct_bias,
            nesterov=self.nesterov,
        )
        U = self.Q_L @ rotated @ self.Q_R.T
        if self.overlap and self.refreshes_now():
            self.refresh_bases()
        if self.max_update_rms > 0:
            rms = math.sqrt(float((U * U).mean()))
            U = U * min(1.0, self.max_update_rms / (rms + 1e-7))

        decayed = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        return move(W, decayed, U, self.lr, self.weight_update_hook)

    def start(self, W: Tensor) -> None:
        """Zero moments and factors, identity bases; no factor on a side longer than ``max_precond_dim``."""
        m, n = W.shape
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(W), torch.zeros_like(W)
        self.Q_L = torch.eye(m, dtype=torch.float64)
        self.Q_R = torch.eye(n, dtype=torch.float64)
        if m <= self.max_precond_dim:
            self.L = torch.zeros(m, m, dtype=torch.float64)
        if n <= self.max_precond_dim:
            self.R = torch.zeros(n, n, dtype=torch.float64)

    def update_factors(self, G: Tensor) -> None:
        """One step of the two running means, both from the factors as they stood before."""
        m, n = G.shape
        left, right = G @ G.T, G.T @ G
        if self.use_kl_shampoo:
            rms = math.sqrt(float((G * G).mean()))
            left = G @ self.inverse(self.R, self.Q_R, rms) @ G.T / n
            right = G.T @ self.inverse(self.L, self.Q_L, rms) @ G / m

        beta = self.factor_beta()
        if self.L is not None:
            self.L = beta * self.L + (1 - beta) * left
        if self.R is not None:
            self.R = beta * self.R + (1 - beta) * right

    def inverse(self, K: Tensor | None, Q: Tensor, rms: float) -> Tensor:
        """The inverse of the other side's factor; the identity where that side is not preconditioned."""
        if K is None:
            return torch.eye(len(Q), dtype=torch.float64)
        if self.first_step == "adam" and not K.any():  # nothing in it yet: the identity at the gradient's scale
            return torch.eye(len(Q), dtype=torch.float64) / max(rms, self.eps)
        return floored_inverse(K, Q, self.eps, self.relative_floor)

    def factor_beta(self) -> float:
        """The weight of the past in the factors' running mean."""
        if self.correct_shampoo_beta_bias:
            return 1 - (1 - self.shampoo_beta) / (1 - self.shampoo_beta**self.t)
        return self.shampoo_beta

    def first_refresh_step(self) -> int:
        """The step that makes the first basis that is not the identity."""
        return 1 if self.first_step == "eigenbasis" or self.overlap else 2

    def refreshes_now(self) -> bool:
        """In the step with the first basis, and then when the turn comes; there are ``precondition_frequency`` turns.

        In the k-th step after the first basis come ``precondition_frequency * refresh_ramp / k`` of them, rounded to an
        integer, but not more than there are and not fewer than one.
        """
        if self.first_step == "adam" and not self.exp_avg_sq.any():
            return False  # the moments have seen only zero gradients so far
        since_first = self.t - self.first_refresh_step()
        if since_first <= 0:
            return since_first == 0
        turns = self.precondition_frequency
        taken = [math.floor(Fraction(turns * self.refresh_ramp, k) + Fraction(1, 2)) for k in range(1, since_first + 1)]
        now = self.turn + sum(max(1, min(turns, count)) for count in taken)
        before = now - max(1, min(turns, taken[-1]))
        return now // turns > before // turns

    def refresh_bases(self) -> None:
        """New bases, and the moments turned into them.

        The second one as if its entries were independent, or in the published form with the columns, as they are
        taken up.
        """
        first = self.t == self.first_refresh_step()
        moment = self.Q_L @ self.exp_avg @ self.Q_R.T
        before_L, before_R = self.Q_L, self.Q_R
        old_L, rows = self.sorted_basis(self.L, before_L)
        old_R, columns = self.sorted_basis(self.R, before_R)
        self.Q_L, self.Q_R = self.new_basis(self.L, old_L, first), self.new_basis(self.R, old_R, first)
        if first and self.left_null_space is not None:
            self.Q_L[:, -self.left_null_space.shape[1] :] = self.left_null_space
        if self.first_step == "adam":  # variances of independent entries add with squared weights
            self.exp_avg_sq = (self.Q_L.T @ before_L) ** 2 @ self.exp_avg_sq @ (before_R.T @ self.Q_R) ** 2
        else:
            self.exp_avg_sq = self.exp_avg_sq[rows, :][:, columns]
        self.exp_avg = self.Q_L.T @ moment @ self.Q_R

    def sorted_basis(self, K: Tensor | None, Q: Tensor) -> tuple[Tensor, list[int]]:
        """An old basis with its columns by falling Rayleigh quotient of the new factor, and their order."""
        order = list(range(len(Q))) if K is None else falling_order(K, Q)
        return Q[:, order], order

    def new_basis(self, K: Tensor | None, Q: Tensor, first: bool) -> Tensor:
        """By eigh where it is the first or where that is asked for, else from the last one, columns sorted."""
        if K is None:
            return Q
        if first or self.use_eigh:
            return eigenbasis(K)
        return orthogonal_iteration(K, Q, self.power_iter_steps)
