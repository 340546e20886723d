r"""MOSO: momentum one-sided SOAP, RMSProp of the momentum in the eigenbasis of the momentum's own shorter side.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu)\, G_t, \qquad
    C_t = \beta'_s C_{t-1} + (1 - \beta'_s)\, M_t M_t^\top, \qquad Q \leftarrow \text{eigenvectors of } C_t \\
    M'_t &= Q^\top M_t, \qquad v_t = \beta v_{t-1} + (1 - \beta)\, {M'_t}^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1}
        - \eta\, Q \frac{M'_t}{\sqrt{v_t / (1 - \beta^t)} + \epsilon}

for an (M, N) matrix with M <= N; a tall one is treated as its transpose. :math:`\beta'_s = 1 - (1 - \beta_s) / (1 -
\beta_s^t)` makes C an exact weighted mean from the first step on. What is divided by :math:`\sqrt v` is the average
whose squares v follows, so the update's RMS is near 1, as Muon's is, and not Adam's 0.2.

The first step keeps the identity as the basis and is RMSProp's, the second takes the first eigenbasis, by eigh; from
then on the basis follows C by orthogonal iteration. v is carried from the old basis into the new one as the variance of
uncorrelated entries, :math:`v \leftarrow (T^{\circ 2})^\top v` with :math:`T = Q_\text{old}^\top Q_\text{new}`.
`first_step="eigenbasis"` is the published start: the first momentum's own eigenbasis, and a v that stays where it is
while the basis turns under it. `correct_bias=False` is the published RMSProp, whose first update is
:math:`1 / \sqrt{1 - \beta}` = 4.5 times as large.

State for an M x N matrix, M <= N: 2 MN + 2 M^2 numbers. For hidden matrices with one long side, where SOAP's factor of
that side costs more than it brings.

References:
    NVIDIA 2026, Emerging-Optimizers, MOSO.
    Vyas et al. 2024, SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Phase, Rule, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import (
    FRACTION,
    CorrectBias,
    LearningRate,
    MatrixParams,
    MaxUpdateRms,
    Momentum,
    Option,
    PositiveEps,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Like, Momentum_BMN, Part
from emerging_optimizers.engine.schedule import Schedule
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.kernels.symmetric import gram
from emerging_optimizers.linalg.orthogonal_iteration import orthogonal_iteration
from emerging_optimizers.linalg.scaling import clip_rms
from emerging_optimizers.soap.options import FirstStep
from emerging_optimizers.soap.soap import FirstStepT


class MOSOState(NamedTuple):
    """Momentum, its second moment in the basis, factor and basis of the shorter side, whose length is S."""

    momentum_buffer: Momentum_BMN
    exp_avg_sq: Like
    M: Annotated[Tensor, Part("B S S")]
    Q_M: Annotated[Tensor, Part("B S S", start="identity", rounds=True)]  # columns by falling eigenvalue


@dataclass(frozen=True, kw_only=True)
class MOSORule(Rule):
    """Momentum, its factor and basis, RMSProp in the basis."""

    State = MOSOState
    reads = ("momentum", "rms_beta", "shampoo_beta", "eps", "step")
    max_update_rms: float = 0.0
    correct_bias: bool = True
    first_step: FirstStepT = "adam"
    capturable: bool = False

    @cached_property
    def schedule(self) -> Schedule:
        """A refresh in every step; the first basis in the second one, or with the published start in the first."""
        return Schedule(first=1 if self.first_step == "eigenbasis" else 2)

    def accumulate(self, grad: Tensor, state: Any, t: Scalars) -> Any:
        """The gradient in the momentum, and that in the factor; S x T is a matrix with its shorter side first."""
        s: MOSOState = state
        momentum_BMN = lerp(s.momentum_buffer, grad, 1 - t.momentum)
        share = (1 - t.shampoo_beta) / debias(t.shampoo_beta, t.step, grad)
        return s._replace(momentum_buffer=momentum_BMN, M=lerp(s.M, gram(_shorter_first(momentum_BMN)), share))

    def refresh(self, state: Any, phase: Phase) -> Any:
        """A basis that follows the factor, and the second moment in it."""
        s: MOSOState = state
        if phase is Phase.FIRST:
            basis = eigh_descending(s.M)[1]
        else:
            basis = orthogonal_iteration(s.M, s.Q_M, may_wait=not self.capturable)
        if self.first_step == "eigenbasis":
            return s._replace(Q_M=basis)
        # Where there was none but zero gradients, this one is the first: it is not rotated by itself.
        v_BST = _shorter_first(s.exp_avg_sq)
        seen = v_BST.amax(dim=(-2, -1), keepdim=True) > 0
        basis = torch.where(seen, basis, s.Q_M)
        v_BST = (s.Q_M.mT @ basis).square().mT @ v_BST
        return s._replace(Q_M=basis, exp_avg_sq=_as_it_lies(v_BST, s.exp_avg_sq))

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: MOSOState = state
        momentum_BST, v_BST = _shorter_first(s.momentum_buffer), _shorter_first(s.exp_avg_sq)
        rotated_BST = s.Q_M.mT @ momentum_BST
        v_BST = lerp(v_BST, rotated_BST.square(), 1 - t.rms_beta)
        unbiased = v_BST / debias(t.rms_beta, t.step, grad) if self.correct_bias else v_BST
        update_BST = clip_rms(s.Q_M @ (rotated_BST / (unbiased.sqrt() + t.eps)), self.max_update_rms)
        return Step(_as_it_lies(update_BST, grad), s._replace(exp_avg_sq=_as_it_lies(v_BST, grad)))


def _shorter_first(x_BMN: Tensor) -> Tensor:
    return x_BMN if x_BMN.size(-2) <= x_BMN.size(-1) else x_BMN.mT


def _as_it_lies(x_BST: Tensor, like_BMN: Tensor) -> Tensor:
    return x_BST if like_BMN.size(-2) <= like_BMN.size(-1) else x_BST.mT


MOSOCorrectBias = Annotated[CorrectBias, "divide the second moment by 1 - beta^t. False is the published RMSProp."]


MOSOFirstStep = Annotated[
    FirstStep,
    '"adam": the first update is RMSProp\'s, the second step makes the first basis, and the second moment is carried '
    'into every new one; "eigenbasis": the published start, with a second moment that does not follow the basis.',
]


class MOSO(RuleOptimizer):
    """MOSO; the equations are in this module's docstring.

    Update: Q RMSProp(Qᵀ m), Q the eigenvectors of m mᵀ averaged, on the shorter side
    When to use it: matrices with one long side, on which SOAP's factor is too dear
    When not to use it: matrices that are nearly square, if SOAP fits: MOSO ended at 2.217 on the demo and SOAP at
        1.648

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = MOSO([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = MOSORule

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; about the RMS of the update."] = 3e-4,
        momentum: Momentum = 0.95,
        rms_beta: Annotated[float, Option(FRACTION, "decay of the momentum's second moment, in [0, 1).")] = 0.95,
        shampoo_beta: Annotated[ShampooBeta, "decay of the factor, in [0, 1)."] = 0.95,
        eps: PositiveEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        max_update_rms: MaxUpdateRms = 0.0,
        correct_bias: MOSOCorrectBias = True,
        first_step: MOSOFirstStep = "adam",
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
