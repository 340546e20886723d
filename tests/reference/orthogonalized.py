"""Muon's relatives on one matrix in float64, each from its paper; `muon.py` has the orthogonalization.

    M <- mu M + (1 - mu) G        N = M, or with nesterov (1 - mu) G + mu M

AdaMuon  arXiv 2507.11005, NorMuon 2510.05491, NAMO 2602.17080, PolarGrad (and the nuclear norm of MOP) 2505.21799,
Scion 2502.07529, SPEL 2601.21487, Muown 2605.10797; the laws of hooks are those of their docstrings.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .hooks import move, unit
from .muon import orthogonalize, polar, scale_factor, schedule
from .weight_decay import decay_gradient, decay_weight


class ReferenceOrthogonalized:
    """Momentum and a map; a subclass has the map."""

    defaults: dict[str, Any] = {}

    def __init__(self, **given: Any) -> None:
        common = {
            "lr": 3e-4,
            "momentum": 0.95,
            "weight_decay": 0.01,
            "weight_decay_method": "decoupled",
            "nesterov": False,
            "coefficient_type": "quintic",
            "num_ns_steps": 5,
            "scale_mode": "spectral",
            "extra_scale_factor": 1.0,
            "fp32_matmul_prec": None,
            "orthogonalizer": "newton_schulz",
            "weight_update_hook": None,
        }
        for name, value in {**common, **self.defaults, **given}.items():
            setattr(self, name, value)
        self.t = 0
        self.momentum_buffer = torch.zeros(0)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def polar(self, matrix: Tensor) -> Tensor:
        """The orthogonalizer."""
        if "newton" not in self.orthogonalizer:
            return polar(matrix)
        return orthogonalize(matrix, schedule(self.coefficient_type, self.num_ns_steps))

    def scale(self, matrix: Tensor) -> float:
        """Muon's scale."""
        return scale_factor(matrix.shape[0], matrix.shape[1], self.scale_mode) * self.extra_scale_factor

    def average(self, G: Tensor) -> Tensor:
        """N, after the momentum has been updated."""
        mu = self.momentum
        if self.t == 0:
            self.momentum_buffer = torch.zeros_like(G)
        self.momentum_buffer = mu * self.momentum_buffer + (1 - mu) * G
        return (1 - mu) * G + mu * self.momentum_buffer if self.nesterov else self.momentum_buffer

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G = weight.double(), grad.double()
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        decayed = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        U = self.direction(self.average(G), G)
        self.t += 1
        return self.move(W, decayed, U)

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        """The map, scale included."""
        return self.polar(N) * self.scale(N)

    def move(self, W: Tensor, decayed: Tensor, U: Tensor) -> Tensor:
        """The new weight."""
        return move(W, decayed, U, self.lr, self.weight_update_hook)


class ReferenceAdaptiveMuon(ReferenceOrthogonalized):
    """V averages without bias correction; adamuon and normuon keep the norm of O."""

    defaults = {"moment2_method": "adamuon", "beta2": 0.95, "eps": 1e-8, "adamuon_scale": "muon"}
    moment2_buffer: Tensor

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        O, b2, eps = self.polar(N), self.beta2, self.eps
        axis = 1 if O.shape[0] >= O.shape[1] else 0
        X = {
            "adamuon": O**2,
            "normuon": (O**2).mean(axis, keepdim=True),
            "namo": torch.tensor([float((G**2).sum())], dtype=torch.float64),
        }[self.moment2_method]
        V: Tensor = b2 * (self.moment2_buffer if self.t else torch.zeros_like(X)) + (1 - b2) * X
        self.moment2_buffer = V
        if self.moment2_method == "namo":
            return O * (N.norm() / (math.sqrt(V.item()) + eps)) * self.scale(O)
        U = O / (V.sqrt() + eps) if self.moment2_method == "adamuon" else O / V.clamp(min=eps).sqrt()
        if self.moment2_method == "normuon" or self.adamuon_scale == "muon":
            U = O.norm() * unit(U)
        return U * self.scale(O)


class ReferencePolarGrad(ReferenceOrthogonalized):
    """Scaled by the nuclear norm."""

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        O = self.polar(N)
        return O * float((O * N).sum()) * self.extra_scale_factor


class ReferenceMOP(ReferenceOrthogonalized):
    """The exact polar factor."""

    defaults = {"scale_mode": "nuclear_norm"}

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        if self.scale_mode != "nuclear_norm":
            return polar(N) * self.scale(N)
        return polar(N) * float(torch.linalg.svdvals(N).sum()) * self.extra_scale_factor


class ReferenceScion(ReferenceOrthogonalized):
    """rho times the steepest point of the norm's unit ball."""

    defaults = {"spectral_radius": 1.0, "norm": "spectral", "weight_decay": 1.0}

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        X = N if N.ndim == 2 else N.reshape(-1, 1)
        rows, columns = X.shape
        result = torch.zeros_like(X)
        if self.norm == "spectral":
            result = self.polar(X) * math.sqrt(rows / columns)
        elif self.norm == "sign":
            result = X.sign() / columns
        elif self.norm == "rms":
            result = unit(X) * math.sqrt(rows * columns)
        elif self.norm == "row":
            for i in range(rows):
                result[i] = unit(X[i]) * math.sqrt(columns)
        else:
            for j in range(columns):
                result[:, j] = unit(X[:, j]) * math.sqrt(rows)
        return result.reshape(N.shape) * self.spectral_radius


class ReferenceSpel(ReferenceOrthogonalized):
    """Two orthogonalizations."""

    defaults = {"weight_decay": 0.1, "scale_mode": "unit_spectral_norm", "tangent": False}

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        self.W = weight.double()
        return super().step(weight, grad)

    def scale(self, matrix: Tensor) -> float:
        M, N = matrix.shape
        return math.sqrt(M / N) if self.scale_mode == "unit_rms_to_rms_norm" and M > N else 1.0

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        if self.tangent:
            P = self.W / self.scale(N)
            if P.shape[0] >= P.shape[1]:
                N = N - P @ (P.T @ N + N.T @ P) / 2
            else:
                N = N - (P @ N.T + N @ P.T) @ P / 2
        return self.scale(N) * self.polar(N)

    def move(self, W: Tensor, decayed: Tensor, U: Tensor) -> Tensor:
        return self.scale(U) * self.polar(decayed - self.lr * U)


class ReferenceMuonHyperball(ReferenceOrthogonalized):
    """Muon with the hook built in."""

    defaults = {"hyperball_radius": None, "hyperball_eps": 1e-8}

    def move(self, W: Tensor, decayed: Tensor, U: Tensor) -> Tensor:
        self.weight_update_hook = ("hyperball", self.hyperball_radius)
        return super().move(W, decayed, U)


class ReferenceMuown(ReferenceOrthogonalized):
    """W = g V / ||V||_row; every row by itself where that is possible."""

    defaults = {"weight_decay": 0.0, "betas": (0.9, 0.95), "adam_eps": 1e-8}

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        W, G = weight.double(), grad.double()
        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        if self.t == 0:
            self.g = self.v_norm = W.norm(dim=1, keepdim=True)
            self.m_g = self.v_g = torch.zeros_like(self.g)
        b1, b2 = self.betas
        u = W / self.g
        grad_g = (G * u).sum(1, keepdim=True)
        N = self.average(self.g / self.v_norm * (G - u * grad_g))
        self.t += 1

        V = u * self.v_norm - self.lr * self.polar(N) * self.scale(N)
        self.m_g = b1 * self.m_g + (1 - b1) * grad_g
        self.v_g = b2 * self.v_g + (1 - b2) * grad_g**2
        adam = self.m_g / (1 - b1**self.t) / ((self.v_g / (1 - b2**self.t)).sqrt() + self.adam_eps)
        self.g = decay_weight(self.g - self.lr * adam, self.lr, self.weight_decay, self.weight_decay_method)
        self.v_norm = V.norm(dim=1, keepdim=True)
        return self.g * V / self.v_norm


class ReferenceMuonMix(ReferenceOrthogonalized):
    """S <- mu_s S + (1 - mu_s) G beside the momentum; M = (1 - w) F + w S (modded-nanogpt, pull request 340)."""

    defaults = {"lr": 3e-3, "slow_momentum": 0.985, "slow_share": 0.5}

    def average(self, G: Tensor) -> Tensor:
        if self.t == 0:
            self.momentum_buffer, self.slow_buffer = torch.zeros_like(G), torch.zeros_like(G)
        self.momentum_buffer = self.momentum * self.momentum_buffer + (1 - self.momentum) * G
        self.slow_buffer = self.slow_momentum * self.slow_buffer + (1 - self.slow_momentum) * G
        mixed = (1 - self.slow_share) * self.momentum_buffer + self.slow_share * self.slow_buffer
        return (1 - self.momentum) * G + self.momentum * mixed if self.nesterov else mixed
