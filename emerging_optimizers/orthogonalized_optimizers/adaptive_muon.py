r"""AdaptiveMuon: Muon with a second moment (AdaMuon, NorMuon, NAMO).

With N and O of Muon (the momentum, perhaps one step ahead, and its polar factor) and s Muon's scale,

.. math::
    W_t = (1 - \eta\lambda) W_{t-1} - \eta \, s \, U_t

where :math:`V_t = \beta_2 V_{t-1} + (1 - \beta_2) X_t` averages X without bias correction, and

.. math::
    \text{adamuon:} && X &= O^2, & U &= \hat O \, \|O\|_F / \|\hat O\|_F, \quad \hat O = O / (\sqrt V + \epsilon) \\
    \text{normuon:} && X &= \mathrm{mean}_d(O^2), & U &= \hat O \, \|O\|_F / \|\hat O\|_F, \quad
        \hat O = O / \sqrt{\max(V, \epsilon)} \\
    \text{namo:} && X &= \|G\|_F^2, & U &= O \, \|N\|_F / (\sqrt V + \epsilon)

Squares and quotients are element by element; normuon averages over the columns of a tall or square matrix, over the
rows of a wide one. adamuon and normuon keep the norm of O, so with `scale_mode="spectral"` the update's RMS is 1 as
Muon's; namo's shrinks where gradients disagree.

Where the rows of a layer see gradients of very different sizes (normuon), or as Muon with an automatic learning rate
(namo). State: 8 bytes a parameter (adamuon), 4 and a vector (normuon), 4 and a number (namo).

References:
    Si et al. 2025, AdaMuon: Adaptive Muon Optimizer, arXiv 2507.11005.
    Li et al. 2025, NorMuon: Making Muon more efficient and scalable, arXiv 2510.05491.
    Zhang et al. 2026, Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum (NAMO),
        arXiv 2602.17080.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor
from torch.linalg import vector_norm

from emerging_optimizers.engine import Scalars, Step, lerp
from emerging_optimizers.engine.options import (
    FRACTION,
    Eps,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
    optional,
)
from emerging_optimizers.engine.parts import Momentum_BMN, Part, before_first_step
from emerging_optimizers.linalg.scaling import MuonScaleT, muon_scale_factor, with_norm_of
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumState, average
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    PolarRule,
)

Moment2MethodT = Literal["adamuon", "normuon", "namo"]
AdaMuonScaleT = Literal["muon", "published"]


class AdaptiveMuonState(NamedTuple):
    """Momentum (B, M, N); second moment (B, M, N), or (B, M, 1) or (B, 1, N) for normuon, or (B, 1) for namo."""

    momentum_buffer: Momentum_BMN
    moment2_buffer: Annotated[Tensor, Part("B M2 N2")]


@dataclass(frozen=True, kw_only=True)
class AdaptiveMuonRule(PolarRule):
    """The polar factor of the momentum, divided by a second moment."""

    reads = ("momentum", "extra_scale_factor", "beta2", "eps")
    scale_mode: MuonScaleT | None = "spectral"
    moment2_method: Moment2MethodT = "adamuon"
    adamuon_scale: AdaMuonScaleT = "muon"

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Zero moments."""
        if self.moment2_method == "namo":
            momentum = before_first_step(MomentumState, shape, dtype, device)
            return AdaptiveMuonState(*momentum, torch.zeros(shape[0], 1, dtype=dtype, device=device))
        second = {"M2": shape[1], "N2": shape[2]}
        if self.moment2_method == "normuon":
            second["N2" if _averaged(shape) == -1 else "M2"] = 1
        return before_first_step(AdaptiveMuonState, shape, dtype, device, sizes=second)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        O = self.orthogonalize(ahead_BMN, t)

        if self.moment2_method == "namo":
            V = lerp(state.moment2_buffer, _norm(grad).square().view(-1, 1), 1 - t.beta2)
            U = O * (_norm(ahead_BMN) / (V.unsqueeze(-1).sqrt() + t.eps))
        elif self.moment2_method == "normuon":
            V = lerp(state.moment2_buffer, O.square().mean(_averaged(O.shape), keepdim=True), 1 - t.beta2)
            U = with_norm_of(O, O * torch.clamp_min(V, t.eps).rsqrt())
        else:
            V = lerp(state.moment2_buffer, O.square(), 1 - t.beta2)
            U = O / (V.sqrt() + t.eps)
            U = with_norm_of(O, U) if self.adamuon_scale == "muon" else U

        scale = 1.0 if self.scale_mode is None else muon_scale_factor(O.size(-2), O.size(-1), self.scale_mode)
        return Step(U * (scale * t.extra_scale_factor), AdaptiveMuonState(momentum_BMN, V))

    def orthogonalize(self, x_BMN: Tensor, t: Scalars) -> Tensor:
        """O, without scale; a subclass of the optimizer may have another."""
        return self.polar(x_BMN)


AdaptiveMuonWeightDecayMethod = Annotated[
    WeightDecayMethod, '"decoupled", "independent", "l2" (not with "namo"), "palm" or "cautious".'
]
Moment2Method = Annotated[
    Moment2MethodT,
    Option(
        one_of(*get_args(Moment2MethodT)),
        '"adamuon" (element-wise), "normuon" (by row or column) or "namo" (one number).',
    ),
]
AdamuonScale = Annotated[
    AdaMuonScaleT,
    Option(
        one_of(*get_args(AdaMuonScaleT)),
        '"muon" gives adamuon\'s quotient the norm of O; "published" leaves it at an RMS of 1 before Muon\'s '
        "scale is applied, so that with the default scale the update is sqrt(max(M, N)) times larger.",
    ),
]


OptionalScaleMode = Annotated[
    MuonScaleT | None,
    Option(
        optional(one_of(*get_args(MuonScaleT))),
        "as in `Muon`; None: none, for a subclass whose `orthogonalize` scales its result.",
    ),
]


class AdaptiveMuon(PolarOptimizer):
    """AdaptiveMuon; the equations are in this module's docstring.

    Update: s O / √v at the norm of O, v by element, by row or one number
    When to use it: Muon where rows see gradients of different sizes (`moment2_method="normuon"`, with a state of 1)
    When not to use it: where memory is short: AdaMuon, the default, keeps two state tensors and Muon keeps one

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = AdaptiveMuon([w], lr=0.1, moment2_method="normuon")
        >>> w.grad = torch.randn(4, 2)
        >>> optimizer.step()
        >>> round(w.square().mean().sqrt().item(), 1)
        0.1
    """

    rule = AdaptiveMuonRule
    uncalled = (
        *PolarOptimizer.uncalled,
        "_apply_moment2_normalization",
        "_apply_muon_scale",
        "_match_frobenius_norm",
    )
    set_later = {
        **{field.name: field.default for field in fields(AdaptiveMuonRule)},
        "scale_mode": None,  # a `scaled_orthogonalize_fn` has it
        "extra_scale_factor": 1.0,
        "beta2": 0.95,
        "eps": 1e-8,
    }

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        nesterov: Nesterov = False,
        weight_decay_method: AdaptiveMuonWeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: OptionalScaleMode = "spectral",
        extra_scale_factor: ExtraScaleFactor = 1.0,
        moment2_method: Moment2Method = "adamuon",
        beta2: Annotated[float, Option(FRACTION, "decay of the second moment, in [0, 1).")] = 0.95,
        eps: Annotated[Eps, "added to the root of the second moment (normuon: its lower bound), >= 0."] = 1e-8,
        adamuon_scale: AdamuonScale = "muon",
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        super()._check_choice(group)
        if group["moment2_method"] == "namo" and group["weight_decay_method"] == "l2":
            raise ValueError(
                "AdaptiveMuon: moment2_method='namo' measures the gradient, which weight_decay_method='l2' would "
                "change; use 'decoupled'"
            )


def _averaged(shape: tuple[int, ...]) -> int:
    """The axis that normuon averages over: the shorter one."""
    return -1 if shape[-2] >= shape[-1] else -2


def _norm(x_BMN: Tensor) -> Tensor:
    return vector_norm(x_BMN, dim=(-2, -1), keepdim=True)
