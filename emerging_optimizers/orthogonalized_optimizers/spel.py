r"""SPEL: SPectral steepest descent on the stiefEL manifold.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    W_t &= \mathrm{NS}\left( (1 - \eta\lambda) W_{t-1} - \eta \, \mathrm{NS}(N_t) \right)

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`. The outer Newton-Schulz keeps the
weight's singular values at 1, or in the band of its coefficients; the first step takes a weight there, whatever it was.
Weight decay does not shrink the weight: it raises the share of the update in what is orthogonalized.

For matrices that are meant to be orthogonal. State: one tensor, 4 bytes a parameter.

References:
    Yang and Lai 2026, Manifold Constrained Steepest Descent, arXiv 2601.21487.
    Bernstein and Newhouse 2024, Modular Duality in Deep Learning, arXiv 2410.21265.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Unpack

from torch import Tensor

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.hooks import WeightUpdateHook
from emerging_optimizers.engine.options import (
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.linalg.precision import fp32_matmul_precision
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumState, average
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    PolarRule,
)


@dataclass(frozen=True)
class Retraction(WeightUpdateHook[Any]):
    """The polar factor of where the ordinary update would go."""

    matrices_only = True
    rule: PolarRule

    def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
        with fp32_matmul_precision(self.rule.fp32_matmul_prec):
            return self.rule.polar(weight * keep - lr * update)


@dataclass(frozen=True, kw_only=True)
class SpelRule(PolarRule):
    """Muon without scale, and a retraction."""

    @property
    def weight_law(self) -> Retraction:
        """The outer Newton-Schulz."""
        return Retraction(self)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        return Step(self.polar(ahead_BMN), MomentumState(momentum_BMN))


class Spel(PolarOptimizer):
    """SPEL; the equations are in this module's docstring.

    Update: O, then W is orthogonalized
    When to use it: weights that are meant to be orthogonal

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.randn(6, 3))
        >>> optimizer = Spel([w], lr=0.1, orthogonalizer="qdwh")
        >>> w.grad = torch.randn(6, 3)
        >>> optimizer.step()
        >>> torch.allclose(w.T @ w, torch.eye(3), atol=1e-5)
        True
    """

    rule = SpelRule

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; the spectral norm of a step before the retraction."] = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.1,
        *,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))
