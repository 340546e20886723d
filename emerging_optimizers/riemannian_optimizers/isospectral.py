r"""Iso: the singular vectors of a weight move, its singular values stay.

.. math::
    W_0 &= U \operatorname{diag}(\sigma) V^\top \\
    M^U_t &= \mu M^U_{t-1} + G_t V \operatorname{diag}(\sigma), \qquad
        M^V_t = \mu M^V_{t-1} + G_t^\top U \operatorname{diag}(\sigma) \\
    U &\leftarrow \mathcal R(U, -\eta M^U_t), \qquad V \leftarrow \mathcal R(V, -\eta M^V_t) \\
    W_t &= U \operatorname{diag}(\sigma) V^\top

For an (M, N) weight with K = min(M, N): U is (M, K), V (N, K). The retraction :math:`\mathcal R(X, D)` leads back to
orthonormal columns: `linalg.stiefel` has the four of them.

Made for reinforcement learning after pretraining, where the spectrum is what should survive. Weight decay shrinks all
singular values by one factor; its l2 form leaves them alone. State: U, V and a momentum for each, 8 K (M + N) bytes: 16
bytes a parameter where M = N.

The factors in the state, not the weight, are what the next step starts from. Who edits the weight (loads a model, swaps
in an average) has to drop the factors, `optimizer.state.pop(p)`, or the edit is gone after the next step.

References:
    ISO: An RLVR-Native Optimization Stack 2026, arXiv 2607.19331.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.hooks import REPLACE, WeightUpdateHook
from emerging_optimizers.engine.options import (
    LearningRate,
    MatmulPrecision,
    MatrixParams,
    Momentum,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
)
from emerging_optimizers.engine.parts import Part
from emerging_optimizers.engine.rule import StartsFromWeight, Where
from emerging_optimizers.engine.weight_decay import WeightDecayT, keep_factor
from emerging_optimizers.linalg.factorizations import factorized
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.linalg.stiefel import RETRACTIONS, RetractionT


class IsoState(NamedTuple):
    """Singular vectors and values, which `start` makes, and the momentum of the vectors."""

    u: Annotated[Tensor, Part("B M S")]
    sigma: Annotated[Tensor, Part("B S")]
    v: Annotated[Tensor, Part("B N S")]
    momentum_u: Annotated[Tensor, Part("B M S")]
    momentum_v: Annotated[Tensor, Part("B N S")]


@dataclass(frozen=True, kw_only=True)
class IsoRule(StartsFromWeight):
    """Iso on a stack."""

    State = IsoState
    reads = ("lr", "momentum", "weight_decay", "step")
    retraction: RetractionT = "qr"
    fp32_matmul_prec: FP32MatmulPrecT = "highest"
    weight_decay_method: WeightDecayT = "decoupled"

    @property
    def weight_law(self) -> WeightUpdateHook[Any]:
        """The weight is made of the factors."""
        return REPLACE

    def largest_norm(self, dtype: torch.dtype) -> float:
        """From 1 / eps on, Cayley's I minus a skew matrix is that matrix alone, which may be singular."""
        return 1 / torch.finfo(dtype).eps if self.retraction == "cayley" else super().largest_norm(dtype)

    def obstacle(self, where: Where) -> str | None:
        """The polar retraction asks the host."""
        if where.capturable and self.retraction == "polar":
            return "the host checks the success of a singular value decomposition; give another retraction"
        return super().obstacle(where)

    def start(self, weight: Tensor, labels: Sequence[str]) -> IsoState:
        """The weight's own factors, and no momentum."""
        u, sigma, vh = factorized("svd", weight)
        v = vh.mT
        return IsoState(u, sigma, v, torch.zeros_like(u), torch.zeros_like(v))

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: IsoState = state
        scale_B1K = s.sigma.unsqueeze(-2)
        momentum_u = s.momentum_u * t.momentum + (grad @ s.v) * scale_B1K
        momentum_v = s.momentum_v * t.momentum + (grad.mT @ s.u) * scale_B1K

        retract = RETRACTIONS[self.retraction]
        u, v = retract(s.u, -t.lr * momentum_u), retract(s.v, -t.lr * momentum_v)
        sigma = s.sigma * keep_factor(self.weight_decay_method, t.lr, t.weight_decay)
        return Step((u * sigma.unsqueeze(-2)) @ v.mT, IsoState(u, sigma, v, momentum_u, momentum_v))


Retraction = Annotated[
    RetractionT, Option(one_of(*get_args(RetractionT)), '"qr", "polar", "cayley" or "newton_schulz".')
]


class Iso(RuleOptimizer):
    """Iso; the equations are in this module's docstring.

    Update: U and V of W = U diag(σ) Vᵀ move along ∂/∂U and ∂/∂V, σ stays
    When to use it: reinforcement learning after pretraining: the spectrum survives
    When not to use it: training from scratch: the singular values of a weight never change

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> optimizer = Iso([w], lr=0.1)
        >>> w.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> optimizer.step()
        >>> torch.linalg.svdvals(w)
        tensor([3.0000, 1.0000], grad_fn=<LinalgSvdBackward0>)
    """

    rule = IsoRule
    uncalled = (*RuleOptimizer.uncalled, "_init_state")

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 1e-3,
        momentum: Momentum = 0.9,
        retraction: Retraction = "qr",
        *,
        fp32_matmul_prec: MatmulPrecision = "highest",
        weight_decay: Annotated[WeightDecay, ">= 0; shrinks all singular values alike."] = 0.0,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
