"""Dion2 and Dion3 on one matrix in float64, row by row.

    M <- M + G; the k lines of M with the largest sums of |M|, k = ceil(f n), are orthogonalized as a matrix of their
    own and scaled as Muon's; afterwards they are multiplied by mu in M.

Ahn, Amsel and Langford 2025, arXiv 2512.16928: lines are rows, or columns where those are fewer. Amsel et al. 2026,
arXiv 2608.11612: lines are rows, and each is divided by sqrt(v) + eps, v an average of its mean square over its uses,
before the matrix gets its old norm back.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .orthogonalized import ReferenceOrthogonalized


class ReferenceDion2(ReferenceOrthogonalized):
    """The lines that are longest."""

    defaults = {"lr": 3e-3, "fraction": 0.25}

    def average(self, G: Tensor) -> Tensor:
        """The sum."""
        if self.t == 0:
            self.momentum_buffer = torch.zeros_like(G)
            self.start(G)
        self.momentum_buffer = self.momentum_buffer + G
        return self.momentum_buffer

    def start(self, G: Tensor) -> None:
        """What else there is."""

    def by_columns(self, N: Tensor) -> bool:
        """Whether lines are columns."""
        return N.shape[0] > N.shape[1]

    def direction(self, N: Tensor, G: Tensor) -> Tensor:
        by_columns = self.by_columns(N)
        lines = [line.clone() for line in (N.T if by_columns else N)]
        longest = sorted(range(len(lines)), key=lambda i: -float(lines[i].abs().sum()))
        chosen = longest[: math.ceil(self.fraction * len(lines))]
        orthogonal = self.normalized(chosen, self.polar(torch.stack([lines[i] for i in chosen])))
        moved = [torch.zeros_like(line) for line in lines]
        for i, line in zip(chosen, orthogonal, strict=True):
            moved[i] = line * self.scale(N)
            lines[i] = lines[i] * self.momentum
        left, update = torch.stack(lines), torch.stack(moved)
        self.momentum_buffer = left.T if by_columns else left
        return update.T if by_columns else update

    def normalized(self, chosen: list[int], orthogonal: Tensor) -> Tensor:
        """What becomes of orthogonal lines."""
        return orthogonal


class ReferenceDion3(ReferenceDion2):
    """The rows that are longest, each by its second moment."""

    defaults: dict[str, Any] = {**ReferenceDion2.defaults, "beta2": 0.95, "eps": 1e-8}

    def start(self, G: Tensor) -> None:
        self.moment2_buffer = torch.zeros(G.shape[0], 1, dtype=G.dtype)

    def by_columns(self, N: Tensor) -> bool:
        return False

    def normalized(self, chosen: list[int], orthogonal: Tensor) -> Tensor:
        rows = []
        for i, row in zip(chosen, orthogonal, strict=True):
            square = float((row**2).mean())
            v = self.beta2 * float(self.moment2_buffer[i]) + (1 - self.beta2) * square
            self.moment2_buffer[i] = v
            rows.append(row / (math.sqrt(v) + self.eps))
        new = torch.stack(rows)
        return new * float(orthogonal.norm() / new.norm())
