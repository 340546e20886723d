r"""SOAP: Adam in the eigenbasis of Shampoo's Kronecker factors.

.. math::
    L_t &= \beta'_s L_{t-1} + (1 - \beta'_s)\, G_t G_t^\top, \qquad
    R_t = \beta'_s R_{t-1} + (1 - \beta'_s)\, G_t^\top G_t \\
    Q_L, Q_R &\leftarrow \text{eigenvectors of } L_t, R_t \\
    G'_t &= Q_L^\top G_t Q_R, \qquad
    U_t = Q_L \,\mathrm{Adam}(G'_t)\, Q_R^\top, \qquad
    W_t = (1 - \eta\lambda) W_{t-1} - \eta\, U_t

:math:`\beta'_s = 1 - (1 - \beta_s) / (1 - \beta_s^t)` makes the factors exact weighted means from the first step on.
With `use_kl_shampoo` each factor is whitened by the other (KL-Shampoo), for an M x N matrix:

.. math::
    L_t = \beta'_s L_{t-1} + \frac{1 - \beta'_s}{N} X X^\top, \quad X = G_t Q_R \Lambda_R^{-1/2}, \qquad
    R_t = \beta'_s R_{t-1} + \frac{1 - \beta'_s}{M} Y^\top Y, \quad Y = \Lambda_L^{-1/2} Q_L^\top G_t

with :math:`\Lambda = \max(\lambda, \epsilon, f\,\bar\lambda)` for :math:`\lambda = \mathrm{diag}(Q^\top K Q)`, its mean
:math:`\bar\lambda` and the `relative_floor` f: without it the smallest eigenvalues, which a few steps have hardly seen,
rule the other factor. The first gradient finds both factors empty; each then
stands for the identity times the gradient's RMS, so that L and R share its scale and neither drowns the gradients that
follow (the published start divides by :math:`\epsilon` instead, and keeps the first gradient for hundreds of steps).

The first basis comes from eigh; from then on the bases follow the factors by one step of orthogonal iteration, or by
eigh again (`use_eigh`). The moments are carried from the old bases into the new ones, the second one as the variance of
uncorrelated entries:

.. math::
    T = Q_\text{old}^\top Q_\text{new}, \qquad
    M \leftarrow T_L^\top M\, T_R, \qquad V \leftarrow (T_L^{\circ 2})^\top\, V\, T_R^{\circ 2}

The published form permutes V with the basis's columns instead. While a basis turns, as after a spike, the first moment
then meets second moments of other directions, and updates grow to hundreds of times their size (docs/spikes.md).

The first step. A basis taken from the same gradient that it then rotates leaves a diagonal and rounding noise, which
Adam blows up to plus or minus one; the published start does that, and its second update is up to 300 times too large.
`first_step="adam"` keeps the identity as the basis for the first update, which is exactly Adam's, and takes the first
eigenbasis in the second step. `"eigenbasis"` is the published start, with the published permutation of V.

`overlap=True` takes the update first, in the bases and moments that the state holds, and refreshes behind it; the first
basis is that of the first gradient then, and rotates the second. On CUDA the refresh runs beside the model. It is
another law: no basis has seen the gradient that it rotates. On the lab's training job that costs 0.13 to 0.23 of loss,
and 0.04 to 0.05 where the learning rate warms up for longer; a refresh in every tenth step costs 0.5 to 0.6, and then
0.11 to 0.14. With a `refresh_ramp` of half the warm-up that is 0.06 to 0.07, and 0.04 (docs/performance.md).

State for an M x N matrix: 2 MN + 2 M^2 + 2 N^2 numbers, M + N more with KL.

References:
    Vyas et al. 2024, SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321.
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
"""

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import Phase, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import (
    Betas,
    CorrectBias,
    LearningRate,
    MatrixParams,
    MaxUpdateRms,
    Nesterov,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import (
    BasisL_BMM,
    BasisR_BNN,
    Decay,
    FactorL_BMM,
    FactorR_BNN,
    Like,
    Part,
    ValuesL_BM,
    ValuesR_BN,
    before_first_step,
)
from emerging_optimizers.engine.rule import TranslatesState, Where
from emerging_optimizers.engine.schedule import Schedule
from emerging_optimizers.linalg.eigenbasis import Followed, eigenbasis, eigenvalues, floored, follow, in_order, kl_sides
from emerging_optimizers.linalg.kernels.symmetric import gram
from emerging_optimizers.linalg.kronecker import project_in, project_out
from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision
from emerging_optimizers.linalg.scaling import clip_rms
from emerging_optimizers.scalar_optimizers.adamw import AdamState, adam_direction
from emerging_optimizers.soap.options import (
    CorrectFactorBias,
    FactorEps,
    FirstStepT,
    PowerIterSteps,
    ProductPrecision,
    RefreshPrecision,
    SOAPOptions,
    StreamList,
    UseEigh,
    UseKLShampoo,
)

__all__ = ["SOAP", "EigenbasisRule", "FirstStepT", "SOAPRule", "SOAPState"]

# Functions of one matrix that are published here; they stand above this layer, and nothing here needs them.
PUBLISHED = (
    *("init_kronecker_factors", "precondition", "update_eigenbasis_and_exp_avgs"),
    *("update_kronecker_factors", "update_kronecker_factors_kl_shampoo"),
)


def __getattr__(name: str) -> Any:
    if name not in PUBLISHED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("emerging_optimizers.published.soap_june"), name)


# REKLS on the demo ends at 1.83 without a floor, at 1.65 with this one (docs/training.md).
DEFAULT_RELATIVE_FLOOR = 1e-2


class SOAPState(NamedTuple):
    """Moments in the eigenbasis, factors, bases; a side that is not preconditioned has no factor and no basis."""

    exp_avg: Annotated[Tensor, Part("B M N", rounds=True, averages=Decay("betas", 0), rotated=True)]
    exp_avg_sq: Like
    L: FactorL_BMM
    R: FactorR_BNN
    Q_L: BasisL_BMM  # columns by falling eigenvalue
    Q_R: BasisR_BNN
    eigvals_L: ValuesL_BM = None  # diag Q_L^T L Q_L; with KL
    eigvals_R: ValuesR_BN = None


@dataclass(frozen=True, kw_only=True)
class EigenbasisRule(TranslatesState):
    """What SOAP and its relatives share: Kronecker factors of the gradient, and their eigenbases."""

    divides_by_eigvals: ClassVar[bool] = False  # `update` needs those of the factors that have seen its gradient
    use_eigh: bool = False
    power_iter_steps: int = 1
    precondition_frequency: int = 1
    refresh_ramp: int = 0
    max_precond_dim: int | None = 10000
    relative_floor: float | None = None
    overlap: bool = False
    fp32_matmul_prec: FP32MatmulPrecT = "highest"
    qr_fp32_matmul_prec: FP32MatmulPrecT = "high"
    capturable: bool = False

    @property
    def whitens_factors(self) -> bool:
        """Each factor sees the gradient whitened by the other one (KL)."""
        return True

    @property
    def corrects_factors(self) -> bool:
        """The factors are exact weighted means from the first step on."""
        return True

    @property
    def published_start(self) -> bool:
        """The first gradient already meets its own eigenbasis."""
        return False

    @property
    def floor(self) -> float:
        """The least share of their mean as which eigenvalues count."""
        if self.relative_floor is not None:
            return self.relative_floor
        return 0.0 if self.published_start else DEFAULT_RELATIVE_FLOOR

    @cached_property
    def schedule(self) -> Schedule:
        """The first basis in the second step; with the published start, and behind a step, in the first."""
        first = 1 if self.published_start or self.overlap else 2
        return Schedule(first=first, period=self.precondition_frequency, ramp=self.refresh_ramp, behind=self.overlap)

    def obstacle(self, where: Where) -> str | None:
        """An eigh that the host waits for overlaps with nothing, and no graph repeats it."""
        if self.overlap and self.use_eigh and where.device.type == "cuda":
            return (
                "overlap=True is not possible with use_eigh=True on CUDA: the host waits for the success of each eigh "
                "and launches nothing of the model until then; give overlap=False, or use_eigh=False (SOAP with "
                "use_kl_shampoo=True is REKLS without eigh)"
            )
        if where.capturable and self.use_eigh:
            return "use_eigh=True takes an eigh in every refresh, whose success the host checks; give use_eigh=False"
        return super().obstacle(where)

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Nothing of a side that is not preconditioned; eigenvalues only with KL."""
        limit = self.max_precond_dim or max(shape)
        long = [side for side, size in zip("LR", shape[1:], strict=True) if size > limit]
        without = {key for side in long for key in (side, f"Q_{side}", f"eigvals_{side}")}
        if not self.whitens_factors:
            without |= {"eigvals_L", "eigvals_R"}
        return before_first_step(self.State, shape, dtype, device, without=without)

    def translate(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """Eigenvalues are left out without KL; with it what is lacking is made of factors, by eigh bases as well."""
        if not self.whitens_factors:
            return {key: value for key, value in saved.items() if not key.startswith("eigvals_")}
        made: dict[str, Tensor | None] = {}
        anew = self.use_eigh and not saved.keys() & {"Q_L", "Q_R"}  # as TpRekls is published
        for key in [key for key in ("L", "R") if key in saved]:
            factor, basis = saved[key], saved.get(f"Q_{key}")
            if anew and factor.ndim > 1 and factor.size(-2) == factor.size(-1):  # what does not fit is named later
                made[f"eigvals_{key}"], made[f"Q_{key}"] = eigenbasis(factor)
            elif f"eigvals_{key}" not in saved and basis is not None and basis.shape == factor.shape:
                made[f"eigvals_{key}"] = eigenvalues(factor, basis.to(factor))
        return {**saved, **made}

    def accumulate(self, grad: Tensor, state: Any, t: Scalars) -> Any:
        """The Kronecker factors with this gradient taken in; for KL both from the old ones."""
        X = Y = grad
        if self.whitens_factors:
            X, Y = kl_sides(grad, state.Q_L, state.Q_R, *self.inverse_roots(state, grad, t))
        share = 1 - t.shampoo_beta
        if self.corrects_factors:
            share = share / debias(t.shampoo_beta, t.step, grad)
        L = None if state.L is None else lerp(state.L, gram(X), share)
        R = None if state.R is None else lerp(state.R, gram(Y.mT), share)
        return state._replace(L=L, R=R)

    def inverse_roots(self, s: Any, grad: Tensor, t: Scalars) -> tuple[Tensor | None, Tensor | None]:
        """The diagonals of Lambda^-1/2, (B, M) and (B, N); an empty factor stands for the identity times the RMS."""
        rms_B1 = None if self.published_start else grad.square().mean(dim=(-2, -1)).sqrt().unsqueeze(-1)
        left, right = (
            None if values is None else floored(values, t.eps, self.floor, rms_B1).rsqrt()
            for values in (s.eigvals_L, s.eigvals_R)
        )
        return left, right

    def refresh(self, state: Any, phase: Phase) -> Any:
        """Bases that follow the factors, with whatever is kept in them; or new eigenvalues in the old bases."""
        if phase is not Phase.REUSE:
            with fp32_matmul_precision(self.qr_fp32_matmul_prec):
                return self.turn(state, phase)
        refreshed_behind = self.overlap and self.precondition_frequency == 1
        if not self.whitens_factors or (refreshed_behind and not self.divides_by_eigvals):
            return state
        return state._replace(eigvals_L=eigenvalues(state.L, state.Q_L), eigvals_R=eigenvalues(state.R, state.Q_R))

    @abstractmethod
    def turn(self, s: Any, phase: Phase) -> Any:
        """The state in bases that follow its factors."""

    def follow(self, factor: Tensor | None, basis: Tensor | None, seen: Tensor, phase: Phase) -> Followed:
        """A factor's next eigenbasis.

        Where the moments have `seen` nothing but zero gradients, (B, 1, 1), and there is no basis yet, this one is the
        first: it is not rotated by itself, but in the old basis, or in the identity in place of an eigh.
        """
        if basis is not None:  # without momentum the newest gradient is all that was seen
            identity = torch.eye(basis.size(-1), dtype=basis.dtype, device=basis.device)
            seen = seen | (basis != identity).any(dim=-1).any(dim=-1).view(-1, 1, 1)
        return follow(
            *(factor, basis),
            steps=None if self.use_eigh or phase is Phase.FIRST else self.power_iter_steps,
            wanted=None if self.published_start else seen,
            with_eigenvalues=self.whitens_factors,
            exact=self.floor < DEFAULT_RELATIVE_FLOOR,
            may_wait=not (self.overlap or self.capturable),
        )


@dataclass(frozen=True, kw_only=True)
class SOAPRule(EigenbasisRule):
    """Factors, bases, Adam in the basis; one stanza each in `update`."""

    State = SOAPState
    reads: ClassVar[tuple[str, ...]] = ("betas", "shampoo_beta", "eps", "step", "l2")
    nesterov: bool = False
    correct_bias: bool = True
    correct_shampoo_beta_bias: bool | None = None
    use_kl_shampoo: bool = False
    max_update_rms: float = 0.0
    first_step: FirstStepT = "adam"

    @property
    def whitens_factors(self) -> bool:
        """With KL."""
        return self.use_kl_shampoo

    @property
    def corrects_factors(self) -> bool:
        """As Adam's moments, unless said otherwise."""
        return self.correct_bias if self.correct_shampoo_beta_bias is None else self.correct_shampoo_beta_bias

    @property
    def published_start(self) -> bool:
        """By `first_step`."""
        return self.first_step == "eigenbasis"

    def turn(self, s: SOAPState, phase: Phase) -> SOAPState:
        """Both moments go into the new bases."""
        seen = s.exp_avg_sq.amax(dim=(-2, -1), keepdim=True) > 0
        left, right = self.follow(s.L, s.Q_L, seen, phase), self.follow(s.R, s.Q_R, seen, phase)
        T_L, T_R = left.rotation, right.rotation
        exp_avg = project_in(s.exp_avg, T_L, T_R)
        if self.published_start:
            exp_avg_sq = in_order(in_order(s.exp_avg_sq, s.L, s.Q_L, dim=-2), s.R, s.Q_R, dim=-1)
        else:
            exp_avg_sq = project_in(s.exp_avg_sq, _square_(T_L), _square_(T_R))  # their last use
        bases = {"Q_L": left.basis, "Q_R": right.basis, "eigvals_L": left.eigvals, "eigvals_R": right.eigvals}
        return s._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **bases)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: SOAPState = state
        if t.l2 is not None:  # which the factors do not see
            grad = grad + t.l2
        direction, moments = self.inner(project_in(grad, s.Q_L, s.Q_R), AdamState(s.exp_avg, s.exp_avg_sq), t)
        update_BMN = self.finish(project_out(direction, s.Q_L, s.Q_R), t)
        return Step(update_BMN, s._replace(exp_avg=moments.exp_avg, exp_avg_sq=moments.exp_avg_sq))

    def inner(self, rotated_BMN: Tensor, moments: AdamState, t: Scalars) -> tuple[Tensor, AdamState]:
        """The element-wise step in the eigenbasis."""
        return adam_direction(rotated_BMN, moments, t, correct_bias=self.correct_bias, nesterov=self.nesterov)

    def finish(self, update_BMN: Tensor, t: Scalars) -> Tensor:
        """What becomes of the update in the parameter's own space."""
        return clip_rms(update_BMN, self.max_update_rms)


def _square_(rotation: Tensor | None) -> Tensor | None:
    return None if rotation is None else rotation.square_()


class SOAP(RuleOptimizer):
    """SOAP; the equations are in this module's docstring.

    Update: Q_L Adam(Q_Lᵀ G Q_R) Q_Rᵀ, Q the eigenvectors of L and R
    When to use it: hidden matrices, where a lower loss for the same steps is worth a costlier step
    When not to use it: where memory or the time of a step is short: 34.8 bytes a weight and 76 % of the time on the
        demo

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = SOAP([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = SOAPRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate,
        betas: Betas = (0.9, 0.95),
        shampoo_beta: ShampooBeta = 0.95,
        eps: FactorEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        nesterov: Annotated[Nesterov, "Adam with Nesterov momentum."] = False,
        correct_bias: Annotated[CorrectBias, "divide Adam's moments by 1 - beta^t."] = True,
        fp32_matmul_prec: ProductPrecision = "highest",
        use_eigh: UseEigh = False,
        qr_fp32_matmul_prec: RefreshPrecision = "high",
        power_iter_steps: PowerIterSteps = 1,
        max_update_rms: MaxUpdateRms = 0.0,
        use_kl_shampoo: UseKLShampoo = False,
        correct_shampoo_beta_bias: CorrectFactorBias = None,
        stream_list: StreamList = None,
        **engine: Unpack[SOAPOptions],
    ) -> None:
        options = given(locals())
        if options.pop("stream_list") is not None:
            warnings.warn(
                "SOAP: stream_list has no effect, matrices of one shape are updated in one call; leave it out",
                UserWarning,
                stacklevel=2,
            )
        super().__init__(**options)

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        if group["overlap"] and group["first_step"] == "eigenbasis":
            raise ValueError(
                f"{cls.__name__}: overlap=True is not possible with first_step='eigenbasis', which rotates the first "
                "gradient into its own eigenbasis, and with overlap bases come after the step; give first_step='adam'"
            )
