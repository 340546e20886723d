"""PSGD: momentum whitened by P = Q^T Q on each side, with Q fitted by a gradient descent of its own.

    Y = P_L X P_R            X = M + (damping + 1e-7 |M|) Z
    Q <- Q - eta / l (C - c I) Q         C = Y Y^T or Y^T Y, c the length of the other side
    l <- max(b l + (1 - b) l', l')       l' = ||C|| + c
    Q <- exp(a R) Q, R along Q^T - Q     W <- keep W - lr P_L M P_R

On a side that is too long Q and C are diagonal: all else of C is dropped.

Li 2015, arXiv 1512.04202, and 2024, arXiv 2402.11858. The norms are estimated, from 32 random vectors, and the
exponential is expanded to second order, as Li does. The random numbers are those of the library, made here one by one
from Python's own integers.
"""

import math

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight

WORD = 2**32


def hash32(x: int) -> int:
    """lowbias32, by Wellons."""
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ x >> 16


def normal(rows: int, columns: int, seed: int, stream: int, step: int) -> Tensor:
    """One number after another, two by two."""
    key = 0
    while seed > 0:
        key = hash32(key ^ seed % WORD)
        seed //= WORD
    key = hash32((hash32((key + stream) % WORD) + step) % WORD)
    half = -(-columns // 2)
    Z = torch.zeros(rows, 2 * half, dtype=torch.float64)
    for i in range(rows):
        row = hash32((key + i) % WORD)
        for j in range(half):
            u, v = ((hash32((row + k) % WORD) + 0.5) / WORD for k in (j, j + half))
            Z[i, j] = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
            Z[i, j + half] = math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v)
    return Z[:, :columns]


def estimated_norm(A: Tensor, starts: Tensor) -> float:
    """Of a symmetric or skew-symmetric matrix, from below: the best of several power iterations."""
    largest = max(float(A.abs().max()), 1e-8)
    A = A / largest
    longest = max(A, key=lambda row: float(row.norm()))
    best = 0.0
    for start in starts:
        v = longest + torch.sign(longest @ start) * start
        for _ in range(2):
            v = A.T @ v
            v = v / (v.norm() + 1e-8)
            v = A.T @ v
        best = max(best, float(v.norm()))
    return largest * best


class ReferencePSGDPro:
    """PSGD on one matrix in float64."""

    def __init__(
        self,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.9,
        *,
        weight_decay_method: str = "decoupled",
        beta_lip: float = 0.9,
        precond_lr: float = 0.1,
        precond_init_scale: float = 1.0,
        damping_noise_scale: float = 0.1,
        min_precond_lr: float = 0.01,
        warmup_steps: int = 10000,
        max_update_rms: float = 0.0,
        max_precond_dim: float = math.inf,
        seed: int | None = None,
    ) -> None:
        self.lr, self.weight_decay, self.weight_decay_method = lr, weight_decay, weight_decay_method
        self.momentum, self.beta_lip, self.scale = momentum, beta_lip, precond_init_scale
        self.precond_lr, self.min_precond_lr, self.warmup_steps = precond_lr, min_precond_lr, warmup_steps
        self.damping, self.max_update_rms = damping_noise_scale, max_update_rms
        self.max_precond_dim = max_precond_dim
        self.seed = torch.initial_seed() if seed is None else seed
        self.t = 0

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        m, n = W.shape
        if self.t == 0:
            self.exp_avg = torch.zeros_like(W)
            self.Q = [self.scale * torch.eye(size, dtype=torch.float64) for size in W.shape]
            self.L = [1.0, 1.0]
        self.t += 1
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        self.exp_avg = self.momentum * self.exp_avg + (1 - self.momentum) * G
        M = self.exp_avg

        Z = normal(m, n, self.seed, stream=0, step=self.t)
        Y = self.whiten(M + (self.damping + 1e-7 * M.abs()) * Z)
        # The first step has the full rate: the schedule counts the steps before.
        rate = max(self.precond_lr / math.sqrt(1 + (self.t - 1) / self.warmup_steps), self.min_precond_lr)
        both = normal(32, m + n, self.seed, stream=1, step=self.t)
        for side, (C, starts) in enumerate(((Y @ Y.T, both[:, :m]), (Y.T @ Y, both[:, m:]))):
            Q, other = self.Q[side], W.shape[1 - side]
            diagonal = len(C) > self.max_precond_dim
            if diagonal:
                C = torch.diag(torch.diag(C))
            bound = (float(C.max()) if diagonal else estimated_norm(C, starts)) + other
            self.L[side] = max(self.beta_lip * self.L[side] + (1 - self.beta_lip) * bound, bound)
            Q = Q - rate / self.L[side] * (C - other * torch.eye(len(C), dtype=torch.float64)) @ Q
            self.Q[side] = Q if diagonal else self.rotate(Q, starts)
        left, right = (float(Q.abs().max()) for Q in self.Q)
        self.Q = [self.Q[0] * math.sqrt(right / left), self.Q[1] * math.sqrt(left / right)]

        U = self.whiten(M)
        if self.max_update_rms > 0:
            U = U * min(1.0, self.max_update_rms / (float(U.square().mean().sqrt()) + 1e-7))
        return W - self.lr * U

    def whiten(self, X: Tensor) -> Tensor:
        """P_L X P_R."""
        left, right = self.Q
        return left.T @ left @ X @ right.T @ right

    @staticmethod
    def rotate(Q: Tensor, starts: Tensor) -> Tensor:
        """Along R = Q^T - Q of norm 1, by the a of [0, 1/8] with the largest trace of (I + a R + a^2 R^2 / 2) Q."""
        R = Q.T - Q
        R = R / max(estimated_norm(R, starts), 1e-8)
        slope, curvature = float(torch.trace(R @ Q)), float(torch.trace(R @ R @ Q))
        a = min(max(-slope / curvature, 0.0), 0.125) if curvature < 0 else 0.125
        return Q + a * R @ Q + a * a / 2 * R @ R @ Q
