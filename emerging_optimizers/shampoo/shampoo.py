r"""Shampoo: momentum between the inverse roots of two Kronecker factors.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
    L_t &= \beta' L_{t-1} + (1 - \beta')\, G_t G_t^\top, \qquad
    R_t = \beta' R_{t-1} + (1 - \beta')\, G_t^\top G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta\, L_t^{-1/p} M_t R_t^{-1/p}

for an (M, N) matrix; L is (M, M), R is (N, N). :math:`\beta' = 1 - (1 - \beta) / (1 - \beta^t)` makes the factors
exact weighted means from the first step on. The root is damped,
:math:`\lambda^{1/p} / (\lambda^{2/p} + \epsilon^{2/p})` for each eigenvalue :math:`\lambda`, so that factors of less
than full rank need no start from :math:`\epsilon I`.

With p = 4 the update does not depend on the gradient's scale, and for a single gradient it is the polar factor: Muon is
Shampoo without memory in its factors. The momentum starts at zero and is not bias-corrected, so the first updates are
:math:`1 - \mu^t` of the later ones.

A side longer than `max_precond_dim` has no factor, and the other one takes the whole root, :math:`L^{-2/p} M` or
:math:`M R^{-2/p}`: Shampoo of one axis, which p = 4 leaves independent of the gradient's scale and the polar factor of
a single gradient, as both sides together are. With both sides longer it is SGD with momentum.

`scale_mode` multiplies the update by Muon's number of the shape; for a single gradient "spectral" makes its RMS 1.

KlShampoo has the factors of KL-Shampoo, each fitted to gradients that the other one has whitened,

.. math::
    L_t = \beta' L_{t-1} + \frac{1 - \beta'}{N}\, G_t R_{t-1}^{-1} G_t^\top, \qquad
    R_t = \beta' R_{t-1} + \frac{1 - \beta'}{M}\, G_t^\top L_{t-1}^{-1} G_t

where the first ones see the plain gradient (eigenvalues start at 1). With p = 2 its update does not depend on the
gradient's scale after the first steps; with the published p = 4 it grows with its root. A first factor of less than
full rank (M and N differ) divides the second gradient by `eps`, which then rules for hundreds of steps: `kl_shampoo`
starts at the gradient's scale, floors eigenvalues, and is the one to take.

State for an M x N matrix: MN + M^2 + N^2 numbers, fewer than SOAP's; two eigendecompositions a step. For the hidden
matrices of a network, where memory for SOAP's second moment and bases is short, and as a baseline.

References:
    Gupta, Koren and Singer 2018, Shampoo: Preconditioned Stochastic Tensor Optimization, arXiv 1802.09568.
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
    Anil et al. 2020, Scalable Second Order Optimization for Deep Learning, arXiv 2002.09018: no factor of a long side,
        and exponents by the number of sides that have one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import (
    POSITIVE,
    LearningRate,
    MatrixParams,
    MaxPrecondDim,
    Momentum,
    Option,
    PositiveEps,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
    optional,
)
from emerging_optimizers.engine.parts import (
    BasisL_BMM,
    BasisR_BNN,
    FactorL_BMM,
    FactorR_BNN,
    Momentum_BMN,
    Part,
    before_first_step,
)
from emerging_optimizers.engine.preconditioner import PreconditionerRule
from emerging_optimizers.engine.rule import Where, rule_of
from emerging_optimizers.engine.validate import checked_update
from emerging_optimizers.linalg.eigenbasis import floored, kl_sides
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.inverse_root import root_of_eigen
from emerging_optimizers.linalg.kernels.symmetric import gram
from emerging_optimizers.linalg.scaling import MuonScaleT, muon_scale_factor
from emerging_optimizers.shampoo.preconditioners import KlShampooPreconditioner as KlShampooPreconditioner  # published
from emerging_optimizers.shampoo.preconditioners import ShampooPreconditioner as ShampooPreconditioner  # here, too
from emerging_optimizers.shampoo.preconditioners import ShampooPreconditionerProtocol

ShampooScaleT = MuonScaleT | None
Eigen = tuple[Tensor, Tensor] | None  # eigenvalues (B, N) and eigenvectors (B, N, N) of a factor


def get_shampoo_scale_factor(size_out: int, size_in: int, mode: ShampooScaleT = "spectral") -> float:
    """What an update of a (size_out, size_in) matrix is multiplied by: Muon's factor; None: 1.

    Raises:
        ValueError: for another mode.

    Example:
        >>> get_shampoo_scale_factor(1024, 256), get_shampoo_scale_factor(1024, 256, None)
        (32.0, 1.0)
    """
    return 1.0 if mode is None else muon_scale_factor(size_out, size_in, mode)


class ShampooState(NamedTuple):
    """Momentum and factors; a side that is too long has none."""

    exp_avg: Momentum_BMN
    L: FactorL_BMM
    R: FactorR_BNN


@dataclass(frozen=True, kw_only=True)
class ShampooRule(Rule):
    """Momentum and factors, then the momentum between their inverse roots."""

    State: ClassVar[type[Any]] = ShampooState
    reads = ("momentum", "shampoo_beta", "eps", "step")
    p_root_inv: float = 4
    max_precond_dim: int | None = 10000
    scale_mode: ShampooScaleT = None
    of_rows: ClassVar[tuple[str, ...]] = ("L",)
    of_columns: ClassVar[tuple[str, ...]] = ("R",)

    def obstacle(self, where: Where) -> str | None:
        """The inverse roots ask the host."""
        if where.capturable:
            return "the host checks the success of an eigh in every step; use SOAP"
        return super().obstacle(where)

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Nothing of a side that is too long."""
        limit = self.max_precond_dim or max(shape)
        parts = (self.of_rows, self.of_columns)
        long = [part for side, size in zip(parts, shape[1:], strict=True) for part in side if size > limit]
        return before_first_step(self.State, shape, dtype, device, without=long)

    def sides(self, grad: Tensor, state: Any, t: Scalars) -> tuple[Tensor, Tensor]:
        """What L and what R see of a gradient, both (B, M, N)."""
        return grad, grad

    def kept(self, state: Any, left: Eigen, right: Eigen, **new: Any) -> Any:
        """The new state."""
        return state._replace(**new)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN = lerp(state.exp_avg, grad, 1 - t.momentum)
        share = (1 - t.shampoo_beta) / debias(t.shampoo_beta, t.step, grad)
        X, Y = self.sides(grad, state, t)
        L = None if state.L is None else lerp(state.L, gram(X), share)
        R = None if state.R is None else lerp(state.R, gram(Y.mT), share)
        root = self.p_root_inv / (2 if L is None or R is None else 1)  # half of what two sides share is one's alone
        left, right = (None if factor is None else eigh_descending(factor) for factor in (L, R))
        update_BMN = momentum_BMN if left is None else root_of_eigen(*left, root, t.eps) @ momentum_BMN
        update_BMN = update_BMN if right is None else update_BMN @ root_of_eigen(*right, root, t.eps)
        if self.scale_mode is not None:
            update_BMN = update_BMN * get_shampoo_scale_factor(grad.size(-2), grad.size(-1), self.scale_mode)
        return Step(update_BMN, self.kept(state, left, right, exp_avg=momentum_BMN, L=L, R=R))


class KlShampooState(NamedTuple):
    """Momentum, factors, and the eigenbases in which the next gradient is whitened; nothing of a side that is long."""

    exp_avg: Momentum_BMN
    L: FactorL_BMM
    R: FactorR_BNN
    Q_L: BasisL_BMM
    Q_R: BasisR_BNN
    eigvals_L: Annotated[Tensor | None, Part("B M", start=1.0)]
    eigvals_R: Annotated[Tensor | None, Part("B N", start=1.0)]


@dataclass(frozen=True, kw_only=True)
class KlShampooRule(ShampooRule):
    """The factors of KL-Shampoo between the same roots."""

    State = KlShampooState
    of_rows = ("L", "Q_L", "eigvals_L")
    of_columns = ("R", "Q_R", "eigvals_R")

    def sides(self, grad: Tensor, state: Any, t: Scalars) -> tuple[Tensor, Tensor]:
        """Each whitened by the other one as it was."""
        values = state.eigvals_L, state.eigvals_R
        roots = (None if v is None else floored(v, t.eps).rsqrt() for v in values)
        return kl_sides(grad, state.Q_L, state.Q_R, *roots)

    def kept(self, state: Any, left: Eigen, right: Eigen, **new: Any) -> Any:
        """With the bases of this step."""
        values_L, Q_L = left or (None, None)
        values_R, Q_R = right or (None, None)
        return KlShampooState(**new, Q_L=Q_L, Q_R=Q_R, eigvals_L=values_L, eigvals_R=values_R)


@dataclass(frozen=True, kw_only=True)
class OneByOneRule(PreconditionerRule):
    """A preconditioner of the user's, or a function ahead of one."""

    reads = ("momentum", "shampoo_beta", "eps", "step", "parameters")
    like = ShampooState
    calls = (*PreconditionerRule.calls, "precondition")
    p_root_inv: float
    scale_mode: ShampooScaleT

    def before(self, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """The moment, and what the class begins with."""
        return {"exp_avg": torch.zeros(shape, device=device), **super().before(shape, device)}

    def one(self, grad_MN: Tensor, state: dict[str, Tensor], t: Scalars, step: int) -> Tensor:
        """The published step."""
        preconditioner = self.cls(state, self.p_root_inv, t.eps)
        update_MN = self.function(grad_MN, state["exp_avg"], momentum=t.momentum)
        update_MN = checked_update(self.function.__qualname__, update_MN, grad_MN)
        self.take_in(preconditioner, grad_MN, t, step)
        update_MN = checked_update(f"{self.cls.__name__}.precondition", preconditioner.precondition(update_MN), grad_MN)
        preconditioner.rebind_state(state)
        return update_MN * get_shampoo_scale_factor(grad_MN.size(0), grad_MN.size(1), self.scale_mode)


ShampooLearningRate = Annotated[
    LearningRate,
    "learning rate, >= 0. With p = 4 the RMS of an update of an M x N matrix is lr (M N)^(-1/4) times a number that "
    "grows with the agreement of successive gradients: sqrt((1 - mu) / (1 + mu)) for independent ones.",
]
PRootInv = Annotated[
    float,
    Option(
        POSITIVE,
        "p, > 0. 4 is Shampoo's; 2 whitens twice as much, and the update then shrinks as gradients grow.",
    ),
]


ShampooEps = Annotated[PositiveEps, "eigenvalues of the factors below it are faded out, > 0."]
ShampooMaxPrecondDim = Annotated[
    MaxPrecondDim,
    "a side that is longer has no factor, and the other one takes the whole root; both longer: SGD with momentum. "
    "None: no limit.",
]


ShampooScale = Annotated[
    ShampooScaleT,
    Option(
        optional(one_of(*get_args(MuonScaleT))),
        'what the update is multiplied by: "spectral" sqrt(max(M, N)), "shape_scaling" sqrt(max(1, M / N)), '
        '"unit_rms_norm" sqrt(M / N); None: 1.',
    ),
]


class ShampooBase(RuleOptimizer):
    """The base of Shampoo with a step of your own ahead of its roots: override `_scalar_update`.

    A subclass may also set `PreconditionerCls`, and keep its factors otherwise (`ShampooPreconditionerProtocol`).

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.
        NotImplementedError: `_scalar_update` is not overridden.

    Example:
        >>> class SGDShampoo(ShampooBase):
        ...     def _scalar_update(self, grad, exp_avg, *, momentum):
        ...         return exp_avg.mul_(momentum).add_(grad)
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
        >>> SGDShampoo([w], lr=0.1, scale_mode=None).step()
        >>> w.diagonal()
        tensor([-0.1000,  0.1000], grad_fn=<DiagonalBackward0>)
    """

    rule = ShampooRule
    overridable = ("_scalar_update",)
    PreconditionerCls: ClassVar[type[ShampooPreconditionerProtocol]] = ShampooPreconditioner

    def __init__(
        self,
        params: MatrixParams,
        lr: ShampooLearningRate,
        momentum: Momentum = 0.9,
        shampoo_beta: ShampooBeta = 0.95,
        eps: ShampooEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        p_root_inv: PRootInv = 4,
        scale_mode: ShampooScale = "spectral",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        cls = type(self)
        if cls._scalar_update is ShampooBase._scalar_update:
            raise NotImplementedError(f"{self._name} has no _scalar_update; override it, or use Shampoo")
        home = next(c for c in cls.__mro__ if "rule" in vars(c))  # whose preconditioner its rule is
        if cls._scalar_update is Shampoo._scalar_update and cls.PreconditionerCls is home.PreconditionerCls:  # type: ignore[attr-defined]  # a ShampooBase
            return super()._make_rule(group)
        return rule_of(OneByOneRule, {**group, "cls": cls.PreconditionerCls, "function": self._scalar_update})

    def _scalar_update(self, grad: Tensor, exp_avg: Tensor, *, momentum: float) -> Tensor:
        """What goes between the roots, of one matrix.

        Args:
            grad: (M, N), float32.
            exp_avg: the moment, changed in place.
            momentum: the group's.
        """
        raise NotImplementedError  # the user's part


class Shampoo(ShampooBase):
    """Shampoo; the equations are in this module's docstring.

    Update: L^(−1/p) m R^(−1/p), p = 4
    When to use it: as a baseline; where memory for SOAP is short
    When not to use it: where memory for SOAP is there: Shampoo ended at 1.919 on the demo and SOAP at 1.648

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Shampoo([w], lr=0.1, momentum=0.0)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
        >>> optimizer.step()
        >>> w.diagonal()
        tensor([-0.1000,  0.1000], grad_fn=<DiagonalBackward0>)
    """

    rule = ShampooRule

    def __init__(
        self,
        params: MatrixParams,
        lr: ShampooLearningRate,
        momentum: Momentum = 0.9,
        shampoo_beta: ShampooBeta = 0.95,
        eps: ShampooEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        p_root_inv: PRootInv = 4,
        weight_decay_method: WeightDecayMethod = "decoupled",
        scale_mode: ShampooScale = None,
        max_precond_dim: ShampooMaxPrecondDim = 10000,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))

    def _scalar_update(self, grad: Tensor, exp_avg: Tensor, *, momentum: float) -> Tensor:
        """The momentum, for overrides that build on it; the optimizer itself works on stacks."""
        return exp_avg.lerp_(grad, 1 - momentum)


class KlShampoo(Shampoo):
    """Shampoo with the factors of KL-Shampoo; the equations are in this module's docstring.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = KlShampoo([w], lr=0.1, momentum=0.0, scale_mode=None)
        >>> w.grad = torch.tensor([[8.0, 0.0], [0.0, -8.0]])
        >>> optimizer.step()
        >>> w.diagonal()
        tensor([-0.1414,  0.1414], grad_fn=<DiagonalBackward0>)
    """

    rule = KlShampooRule
    PreconditionerCls = KlShampooPreconditioner

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate,
        momentum: Momentum = 0.9,
        shampoo_beta: ShampooBeta = 0.95,
        eps: ShampooEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        p_root_inv: PRootInv = 4,
        scale_mode: ShampooScale = "spectral",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
