r"""SPEL: SPectral steepest descent on the stiefEL manifold.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    W_t &= \sigma \, \mathrm{NS}\left( (1 - \eta\lambda) W_{t-1} - \eta \sigma \, \mathrm{NS}(N_t) \right)

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`. The outer Newton-Schulz keeps the
weight's singular values at 1, or in the band of its coefficients; the first step takes a weight there, whatever it was.
Weight decay does not shrink the weight: it raises the share of the update in what is orthogonalized.

:math:`\sigma` is 1, or with `scale_mode="unit_rms_to_rms_norm"` max(1, sqrt(M / N)), so that a layer (out, in) keeps
the RMS of what goes through it. With `tangent` only the part of :math:`N_t` that is tangent to the manifold is
orthogonalized, :math:`N - P \, \mathrm{sym}(P^\top N)` where :math:`P = W / \sigma` has M >= N, so that nothing of a
step goes into what the retraction takes back.

For matrices that are meant to be orthogonal. State: one tensor, 4 bytes a parameter.

References:
    Yang and Lai 2026, Manifold Constrained Steepest Descent, arXiv 2601.21487.
    Bernstein and Newhouse 2024, Modular Duality in Deep Learning, arXiv 2410.21265.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Unpack, get_args

from torch import Tensor

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.hooks import WeightUpdateHook
from emerging_optimizers.engine.options import (
    FLAG,
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

SpelScaleT = Literal["unit_spectral_norm", "unit_rms_to_rms_norm"]


def get_spel_scale_factor(size_out: int, size_in: int, mode: SpelScaleT = "unit_spectral_norm") -> float:
    """The singular values of a weight (size_out, size_in): 1, or with "unit_rms_to_rms_norm" max(1, sqrt(out / in)).

    Raises:
        ValueError: for another mode.

    Example:
        >>> get_spel_scale_factor(1024, 256, "unit_rms_to_rms_norm")
        2.0
    """
    if mode not in get_args(SpelScaleT):
        raise ValueError(f"scale_mode={mode!r} is not one of {', '.join(get_args(SpelScaleT))}")
    return 1.0 if mode == "unit_spectral_norm" else max(1.0, (size_out / size_in) ** 0.5)


@dataclass(frozen=True)
class Retraction(WeightUpdateHook[Any]):
    """The polar factor of where the ordinary update would go, as long as the manifold has it."""

    matrices_only = True
    rule: "SpelRule"

    def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
        with fp32_matmul_precision(self.rule.fp32_matmul_prec):
            return self.rule.polar(weight * keep - lr * update) * self.rule.scale(weight)


@dataclass(frozen=True, kw_only=True)
class SpelRule(PolarRule):
    """Muon with the manifold's scale, and a retraction."""

    reads = (*PolarRule.reads, "weight")
    scale_mode: SpelScaleT = "unit_spectral_norm"
    tangent: bool = False

    @property
    def weight_law(self) -> Retraction:
        """The outer Newton-Schulz."""
        return Retraction(self)

    def scale(self, weight: Tensor) -> float:
        """The manifold's singular values."""
        return get_spel_scale_factor(weight.size(-2), weight.size(-1), self.scale_mode)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        if self.tangent:
            ahead_BMN = tangent_part(t.weight / self.scale(t.weight), ahead_BMN)
        return Step(self.polar(ahead_BMN) * self.scale(grad), MomentumState(momentum_BMN))


def tangent_part(point_BMN: Tensor, x_BMN: Tensor) -> Tensor:
    """The part of X that is tangent to the matrices with orthonormal columns, or rows, at P, which is one."""
    if point_BMN.size(-2) < point_BMN.size(-1):
        return tangent_part(point_BMN.mT, x_BMN.mT).mT
    product_BNN = point_BMN.mT @ x_BMN
    return x_BMN - point_BMN @ (0.5 * (product_BNN + product_BNN.mT))


SpelLearningRate = Annotated[
    LearningRate, "learning rate, >= 0; the spectral norm of a step before the retraction, over that of the weight."
]
SpelScale = Annotated[
    SpelScaleT,
    Option(
        one_of(*get_args(SpelScaleT)),
        'the singular values of the weight: "unit_spectral_norm" 1, "unit_rms_to_rms_norm" max(1, sqrt(M / N)).',
    ),
]
Tangent = Annotated[
    bool, Option(FLAG, "orthogonalize the part of the momentum that is tangent to the manifold, as release 0.5.0 does.")
]


class Spel(PolarOptimizer):
    """SPEL; the equations are in this module's docstring.

    Update: O, then W is orthogonalized
    When to use it: weights that are meant to be orthogonal
    When not to use it: weights that are not meant to be orthogonal: every step makes them so

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
        lr: SpelLearningRate = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.1,
        *,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: SpelScale = "unit_spectral_norm",
        tangent: Tangent = False,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))
