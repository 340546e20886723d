"""Factors and bases of one parameter, as `SoapBase.PreconditionerCls` wants them: for those who keep them otherwise.

`KlSoapPreconditioner` and `ReklsPreconditioner` do for one matrix what `SOAPRule` does for a stack, which is what runs
where they are not changed; the equations are in `soap.soap`. A class of your own may derive from them, or have the
methods of `SoapPreconditionerProtocol`; it is called matrix by matrix.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from emerging_optimizers.engine import Scalars
from emerging_optimizers.engine.preconditioner import PreconditionerProtocol, PreconditionerRule, TensorPair
from emerging_optimizers.engine.validate import checked_update
from emerging_optimizers.linalg.eigenbasis import floored, follow, kl_sides
from emerging_optimizers.linalg.kernels.symmetric import gram
from emerging_optimizers.linalg.kronecker import conjugate_diagonal, project_in
from emerging_optimizers.soap.soap import DEFAULT_RELATIVE_FLOOR, SOAPState


class SoapPreconditionerProtocol(PreconditionerProtocol, Protocol):
    """What `SoapBase` asks of its `PreconditionerCls`."""

    exp_avg: Tensor
    exp_avg_sq: Tensor

    def project_in(self, x: Tensor, /) -> Tensor:
        """Into the bases."""

    def project_out(self, x: Tensor, /) -> Tensor:
        """Out of them."""


class KlSoapPreconditioner:
    """KL factors, and bases that follow them by orthogonal iteration.

    Args:
        state: of one (M, N) matrix, as `init_state` makes it.
        eps: smaller eigenvalues count as this, and as 1 % of their mean.

    Example:
        >>> state = KlSoapPreconditioner.init_state((2, 3), torch.device("cpu"))
        >>> one = KlSoapPreconditioner(state, eps=1e-8)
        >>> one.init_step(torch.ones(2, 3), 0.0)
        >>> one.rebind_state(state)
        >>> state["L"].round(decimals=3)
        tensor([[1., 1.],
                [1., 1.]])
    """

    _eigh: ClassVar[bool] = False

    def __init__(self, state: dict[str, Tensor], eps: float) -> None:
        self.kronecker_factor_pair = TensorPair(state["L"], state["R"])
        self.eigenbasis_pair = TensorPair(state["Q_L"], state["Q_R"])
        self.eigvals_pair = TensorPair(state["eigvals_L"], state["eigvals_R"])
        self.exp_avg, self.exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        self.eps = eps

    @staticmethod
    def init_state(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """Zero moments, factors and eigenvalues, identity bases.

        Raises:
            ValueError: `shape` is not that of a matrix.
        """
        if len(shape) != 2:
            raise ValueError(f"KlSoapPreconditioner takes one matrix (M, N); given is a shape of {tuple(shape)}")
        M, N = shape
        return {
            "exp_avg": torch.zeros(M, N, device=device),
            "exp_avg_sq": torch.zeros(M, N, device=device),
            "L": torch.zeros(M, M, device=device),
            "R": torch.zeros(N, N, device=device),
            "Q_L": torch.eye(M, device=device),
            "Q_R": torch.eye(N, device=device),
            "eigvals_L": torch.zeros(M, device=device),
            "eigvals_R": torch.zeros(N, device=device),
        }

    def rebind_state(self, state: dict[str, Tensor]) -> None:
        """Put every tensor back under its key.

        Raises:
            KeyError: the state lacks a key.
        """
        pairs = {"": self.kronecker_factor_pair, "Q_": self.eigenbasis_pair, "eigvals_": self.eigvals_pair}
        mine = {prefix + side: getattr(pair, side) for prefix, pair in pairs.items() for side in ("L", "R")}
        mine |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if missing := mine.keys() - state.keys():
            raise KeyError(f"rebind_state: the state has no {', '.join(sorted(missing))}; make it with init_state")
        state.update(mine)

    def init_step(self, grad: Tensor, shampoo_beta: float) -> None:
        """The factors see the first gradient; the bases stay, so that it is not rotated by itself."""
        self.update_kronecker_factors(grad, shampoo_beta)
        self.eigvals_pair = TensorPair(*map(conjugate_diagonal, self.kronecker_factor_pair, self.eigenbasis_pair))

    def update_kronecker_factors(self, grad: Tensor, shampoo_beta: float) -> None:
        """Each factor takes the gradient in, whitened by the other one as it was."""
        rms = grad.square().mean().sqrt()
        roots = [floored(v[None], self.eps, DEFAULT_RELATIVE_FLOOR, rms).rsqrt() for v in self.eigvals_pair]
        X, Y = kl_sides(grad[None], *(Q[None] for Q in self.eigenbasis_pair), *roots)
        for factor, side in zip(self.kronecker_factor_pair, (X, Y.mT), strict=True):
            factor.lerp_(gram(side)[0], 1 - shampoo_beta)

    def step(self, grad: Tensor, shampoo_beta: float) -> None:
        """The factors take the gradient in, the bases follow, and both moments are carried into them."""
        self.update_kronecker_factors(grad, shampoo_beta)
        bases, (T_L, T_R), values = zip(
            *map(self._follow, self.kronecker_factor_pair, self.eigenbasis_pair), strict=True
        )
        self.exp_avg = project_in(self.exp_avg, T_L, T_R)
        self.exp_avg_sq = project_in(self.exp_avg_sq, T_L.square(), T_R.square())
        self.eigenbasis_pair, self.eigvals_pair = TensorPair(*bases), TensorPair(*values)

    def _follow(self, factor: Tensor, basis: Tensor) -> tuple[Tensor, ...]:
        first = torch.equal(basis, torch.eye(len(basis), dtype=basis.dtype, device=basis.device))
        steps = None if first or self._eigh else 1
        followed = follow(factor[None], basis[None], steps=steps, with_eigenvalues=True)
        return tuple(x[0] for x in followed if x is not None)

    def project_in(self, x: Tensor) -> Tensor:
        """Q_L^T X Q_R."""
        return self.eigenbasis_pair.L.mT @ x @ self.eigenbasis_pair.R

    def project_out(self, x: Tensor) -> Tensor:
        """Q_L X Q_R^T."""
        return self.eigenbasis_pair.L @ x @ self.eigenbasis_pair.R.mT


class ReklsPreconditioner(KlSoapPreconditioner):
    """The same with a fresh eigh in every step."""

    _eigh = True


@dataclass(frozen=True, kw_only=True)
class SoapPreconditionerRule(PreconditionerRule):
    """A preconditioner of the user's, and a function in its bases."""

    reads = ("betas", "shampoo_beta", "eps", "step", "parameters")
    like = SOAPState
    calls = (*PreconditionerRule.calls, "project_in", "project_out")

    def one(self, grad_MN: Tensor, state: dict[str, Tensor], t: Scalars, step: int) -> Tensor:
        """The published step."""
        preconditioner = self.cls(state, t.eps)
        self.take_in(preconditioner, grad_MN, t, step)
        moments = preconditioner.exp_avg, preconditioner.exp_avg_sq
        inner = self.function(preconditioner.project_in(grad_MN), *moments, betas=t.betas, step=step)
        inner = checked_update(self.function.__qualname__, inner, grad_MN)
        update = checked_update(f"{self.cls.__name__}.project_out", preconditioner.project_out(inner), grad_MN)
        preconditioner.rebind_state(state)
        return update
