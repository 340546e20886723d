"""Factors of one parameter, as `ShampooBase.PreconditionerCls` wants them: for those who keep them otherwise.

They do for one matrix what the rules of `shampoo.shampoo` do for a stack, which is what runs where they are not
changed; the equations are there.
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from emerging_optimizers.engine.preconditioner import PreconditionerProtocol, TensorPair
from emerging_optimizers.linalg.eigenbasis import floored, kl_sides
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.inverse_root import inverse_root, root_of_eigen
from emerging_optimizers.linalg.kernels.symmetric import gram


class ShampooPreconditionerProtocol(PreconditionerProtocol, Protocol):
    """What `ShampooBase` asks of its `PreconditionerCls`: no bases."""

    def precondition(self, x: Tensor, /) -> Tensor:
        """Between the factors' roots."""


class ShampooPreconditioner:
    """Shampoo's factors.

    Args:
        state: of one (M, N) matrix, as `init_state` makes it.
        p_root_inv: p of the roots.
        eps: smaller eigenvalues are faded out.

    Example:
        >>> state = ShampooPreconditioner.init_state((2, 3), torch.device("cpu"))
        >>> one = ShampooPreconditioner(state, p_root_inv=4, eps=1e-8)
        >>> one.init_step(torch.ones(2, 3), 0.0)
        >>> one.rebind_state(state)
        >>> state["L"]
        tensor([[3., 3.],
                [3., 3.]])
    """

    # The keys of the state, and the pairs that hold what stands there.
    keys: ClassVar[dict[str, str]] = {"": "kronecker_factor_pair"}

    def __init__(self, state: dict[str, Tensor], p_root_inv: float, eps: float) -> None:
        for prefix, pair in self.keys.items():
            setattr(self, pair, TensorPair(state[f"{prefix}L"], state[f"{prefix}R"]))
        self.p_root_inv, self.eps = p_root_inv, eps

    kronecker_factor_pair: TensorPair

    @staticmethod
    def init_state(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """Factors of zeros.

        Raises:
            ValueError: `shape` is not that of a matrix.
        """
        if len(shape) != 2:
            raise ValueError(f"a preconditioner takes one matrix (M, N); given is a shape of {tuple(shape)}")
        return {side: torch.zeros(size, size, device=device) for side, size in zip("LR", shape, strict=True)}

    def rebind_state(self, state: dict[str, Tensor]) -> None:
        """Put every tensor back under its key.

        Raises:
            KeyError: the state lacks a key.
        """
        mine = {
            prefix + side: getattr(getattr(self, pair), side) for prefix, pair in self.keys.items() for side in "LR"
        }
        if missing := mine.keys() - state.keys():
            raise KeyError(f"rebind_state: the state has no {', '.join(sorted(missing))}; make it with init_state")
        state.update(mine)

    def init_step(self, grad: Tensor, shampoo_beta: float) -> None:
        """As any other step."""
        self.update_kronecker_factors(grad, shampoo_beta)

    def update_kronecker_factors(self, grad: Tensor, shampoo_beta: float) -> None:
        """Each factor takes in what it sees of the gradient, (M, N)."""
        X, Y = self.sides(grad)
        self.kronecker_factor_pair.L.lerp_(gram(X[None])[0], 1 - shampoo_beta)
        self.kronecker_factor_pair.R.lerp_(gram(Y.mT[None])[0], 1 - shampoo_beta)

    def sides(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What L and what R see of a gradient."""
        return grad, grad

    def step(self, grad: Tensor, shampoo_beta: float) -> None:
        """The factors take the gradient in."""
        self.update_kronecker_factors(grad, shampoo_beta)

    def precondition(self, x: Tensor) -> Tensor:
        """L^(-1/p) X R^(-1/p), (M, N)."""
        left, right = (inverse_root(K[None], self.p_root_inv, self.eps)[0] for K in self.kronecker_factor_pair)
        return left @ x @ right


class KlShampooPreconditioner(ShampooPreconditioner):
    """KL factors, whose eigenvalues start at 1; otherwise as above."""

    keys = {"": "kronecker_factor_pair", "Q_": "eigenbasis_pair", "eigvals_": "eigvals_pair"}
    eigenbasis_pair: TensorPair
    eigvals_pair: TensorPair

    @staticmethod
    def init_state(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """Factors of zeros, identity bases, eigenvalues of 1."""
        state = ShampooPreconditioner.init_state(shape, device)
        for side, size in zip("LR", shape, strict=True):
            state[f"Q_{side}"] = torch.eye(size, device=device)
            state[f"eigvals_{side}"] = torch.ones(size, device=device)
        return state

    def sides(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Each whitened by the other one as it was."""
        roots = [floored(v[None], self.eps).rsqrt() for v in self.eigvals_pair]
        X, Y = kl_sides(grad[None], *(Q[None] for Q in self.eigenbasis_pair), *roots)
        return X[0], Y[0]

    def precondition(self, x: Tensor) -> Tensor:
        """L^(-1/p) X R^(-1/p), (M, N); the bases follow the factors."""
        eigen = [eigh_descending(K[None]) for K in self.kronecker_factor_pair]
        self.eigvals_pair = TensorPair(*(values[0] for values, _ in eigen))
        self.eigenbasis_pair = TensorPair(*(vectors[0] for _, vectors in eigen))
        left, right = (root_of_eigen(*pair, self.p_root_inv, self.eps)[0] for pair in eigen)
        return left @ x @ right
