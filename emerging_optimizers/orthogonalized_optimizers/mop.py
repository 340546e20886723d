r"""MOP: Momentum Orthogonalized by Polar decomposition.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, s \, U V^\top
        \quad\text{for}\quad N_t = U \Sigma V^\top

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`. The polar factor is exact, from a
singular value decomposition; s is the nuclear norm :math:`\operatorname{tr} \Sigma`, with which the update is steepest
descent in the spectral norm and shrinks with the gradient, or one of Muon's scales.

To know what exact orthogonalization would change; it is slow on an accelerator. State: one tensor, 4 bytes a parameter.

References:
    Lau et al. 2025, PolarGrad, arXiv 2505.21799 (the nuclear norm as scale).
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Scalars, Step
from emerging_optimizers.engine.options import (
    ExtraScaleFactor,
    LearningRate,
    MatmulPrecision,
    MatrixParams,
    Momentum,
    Nesterov,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
)
from emerging_optimizers.engine.rule import Where
from emerging_optimizers.linalg.polar import polar_svd
from emerging_optimizers.linalg.scaling import MuonScaleT, muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumRule, MomentumState, average
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

MopScaleT = MuonScaleT | Literal["nuclear_norm"]


@dataclass(frozen=True, kw_only=True)
class MOPRule(MomentumRule):
    """The exact polar factor of the momentum, scaled."""

    reads = ("momentum", "extra_scale_factor")
    scale_mode: MopScaleT = "nuclear_norm"

    def obstacle(self, where: Where) -> str | None:
        """The singular value decomposition asks the host."""
        if where.capturable:
            return "the host checks the success of a singular value decomposition; use PolarGrad(orthogonalizer='qdwh')"
        return super().obstacle(where)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        polar_BMN = polar_svd(ahead_BMN)
        scale: Any  # a number, or (B, 1, 1)
        if self.scale_mode == "nuclear_norm":
            scale = nuclear_norm(polar_BMN, ahead_BMN)
        else:
            scale = muon_scale_factor(grad.size(-2), grad.size(-1), self.scale_mode)
        return Step(polar_BMN * (scale * t.extra_scale_factor), MomentumState(momentum_BMN))


MOPScaleMode = Annotated[
    MopScaleT, Option(one_of("nuclear_norm", *get_args(MuonScaleT)), '"nuclear_norm", or as in `Muon`.')
]


class MOP(OrthogonalizedOptimizer):
    """MOP; the equations are in this module's docstring.

    Update: tr Σ · O, O exact
    When to use it: to know what exact orthogonalization changes
    When not to use it: where time counts: it ended at 2.149 on the demo with 51 % of the time, Muon at 1.741 with
        23 %

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = MOP([w], lr=0.1, momentum=0.0)
        >>> w.grad = torch.diag(torch.tensor([3.0, -1.0]))
        >>> optimizer.step()
        >>> w.detach().diagonal()
        tensor([-0.4000,  0.4000])
    """

    rule = MOPRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: Annotated[MatmulPrecision, "of the last product, U V'."] = "highest",
        scale_mode: MOPScaleMode = "nuclear_norm",
        extra_scale_factor: ExtraScaleFactor = 1.0,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))


def nuclear_norm(polar_BMN: Tensor, x_BMN: Tensor) -> Tensor:
    """<O, X>, the sum of the singular values of X where O is its polar factor; (B, 1, 1)."""
    return torch.sum(polar_BMN * x_BMN, dim=(-2, -1), keepdim=True)


def polar_via_svd(A: Tensor, return_p: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """The polar decomposition A = U P of a matrix or a stack.

    Args:
        A: (..., M, N).
        return_p: form P as well.

    Returns:
        U (..., M, N); P (..., N, N), symmetric positive semi-definite, or None; and the singular values.

    Example:
        >>> U, P, S = polar_via_svd(torch.diag(torch.tensor([2.0, -3.0])), return_p=True)
        >>> torch.allclose(U @ P, torch.diag(torch.tensor([2.0, -3.0]))), S
        (True, tensor([3., 2.]))
    """
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh, (Vh.mH * S.unsqueeze(-2)) @ Vh if return_p else None, S
