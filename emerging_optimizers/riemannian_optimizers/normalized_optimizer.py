r"""The oblique optimizers: columns (or rows) of one norm, moved along their spheres, by SGD or Adam.

.. math::
    B_t &= \mu B_{t-1} + G_t \quad\text{(SGD)} \qquad\text{or}\qquad
        B_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \quad\text{(Adam)} \\
    U_t &= B_t - \hat W \operatorname{diag}(\hat W^\top B_t), \qquad \hat W = W_{t-1} / \|W_{t-1}\| \\
    W_t &= r \frac{k r \hat W - \eta\, U_t}{\|k r \hat W - \eta\, U_t\|}

Norms and inner products are those of columns, or of rows with `dim=1`: U is the part of B that is tangent to the
spheres (the Riemannian gradient), and the division goes back to them (the retraction). r is the radius of the spheres:
1 (`scale_mode="unit_l2_norm"`), or the root of the column's length ("unit_rms_norm"), so that entries have an RMS of 1.
k is the weight decay's factor; where the norm is fixed it only lengthens the step. For embeddings, heads and normalised
layers, where the length of a weight means nothing. Weights that do not start on the manifold are normalised by the
first step. State: SGD 4, Adam 8 bytes a parameter.

The steepest ones take :math:`r \, U_t / \|U_t\|` for U: every column or row turns by the same angle, atan(lr), however
large its gradient, so that the rows of rare tokens move as far as those of frequent ones. A row whose token does not
come goes on in the direction of its momentum until that is below `eps`.

References:
    Boumal 2023, An Introduction to Optimization on Smooth Manifolds, sections 3.6 and 7.2.
    Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696.
    Raman and Yang 2019, Optimization on the Surface of the (Hyper)-Sphere, arXiv 1909.06463.
    Cesista 2025, Heuristic Solutions for Steepest Descent on the Stiefel Manifold, section 6 (the steepest ones).
"""

from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, debias
from emerging_optimizers.engine.hooks import WeightUpdateHook
from emerging_optimizers.engine.options import (
    Betas,
    LearningRate,
    MatrixParams,
    Momentum,
    Option,
    PositiveEps,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
)
from emerging_optimizers.engine.parts import Decay, Part
from emerging_optimizers.scalar_optimizers.adamw import AdamState, adam_direction

ObliqueScaleT = Literal["unit_l2_norm", "unit_rms_norm"]
CorrectBiasT = bool | Literal["published"]
Dim = Annotated[
    int,
    Option(
        one_of(0, 1, -2, -1),
        "the dimension over which norms are taken: 0 for unit columns, 1 for unit rows.",
    ),
]


ObliqueWeightDecay = Annotated[WeightDecay, ">= 0; where the norm is fixed it only lengthens the step."]
ObliqueEps = Annotated[PositiveEps, "smaller norms count as this, > 0."]
ObliqueScale = Annotated[
    ObliqueScaleT,
    Option(
        one_of(*get_args(ObliqueScaleT)),
        'the norm of each column or row: "unit_l2_norm" 1, "unit_rms_norm" the root of its length.',
    ),
]


@dataclass(frozen=True)
class ObliqueHook(WeightUpdateHook[Any]):
    """A step along the spheres of the columns (`dim` 0) or rows (1), and back onto them.

    With `steepest` each of them moves by lr times the radius.
    """

    matrices_only = True
    dim: int
    eps: float
    scale_mode: ObliqueScaleT = "unit_l2_norm"
    steepest: bool = False

    def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
        radius = 1.0 if self.scale_mode == "unit_l2_norm" else sqrt(weight.size(self._axis))
        point = self._normalize(weight)
        tangent = update - point * (point * update).sum(self._axis, keepdim=True)
        if self.steepest:
            tangent = self._normalize(tangent) * radius
        return self._normalize(point * (radius * keep) - lr * tangent) * radius

    def _normalize(self, x_BMN: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x_BMN, dim=self._axis, eps=self.eps)

    @property
    def _axis(self) -> int:
        return self.dim % 2 - 2  # of a matrix in a stack


@dataclass(frozen=True, kw_only=True)
class ObliqueRule(Rule):
    """What the rules share: how the weight moves."""

    steepest: ClassVar[bool] = False
    dim: int = 0
    eps: float = 1e-8
    scale_mode: ObliqueScaleT = "unit_l2_norm"

    @property
    def weight_law(self) -> ObliqueHook:
        """Projection and retraction."""
        return ObliqueHook(self.dim, self.eps, self.scale_mode, self.steepest)


class SumState(NamedTuple):
    """The momentum, a sum of gradients."""

    momentum_buffer: Annotated[Tensor, Part("B M N", rounds=True, averages=Decay())]


@dataclass(frozen=True, kw_only=True)
class ObliqueSGDRule(ObliqueRule):
    """Heavy ball."""

    State = SumState
    reads = ("momentum",)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN = state.momentum_buffer * t.momentum + grad
        return Step(momentum_BMN, SumState(momentum_BMN))


@dataclass(frozen=True, kw_only=True)
class ObliqueAdamRule(ObliqueRule):
    """Adam."""

    State = AdamState
    reads = ("betas", "eps", "step")
    correct_bias: CorrectBiasT = True

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        direction, new = adam_direction(grad, state, t, correct_bias=bool(self.correct_bias))
        if self.correct_bias == "published":
            # sqrt(v) / (1 - b2^t) in place of sqrt(v / (1 - b2^t)); the difference in eps is far below rounding.
            direction = direction * debias(t.betas[1], t.step, grad) ** 0.5
        return Step(direction, new)


@dataclass(frozen=True, kw_only=True)
class ObliqueSteepestSGDRule(ObliqueSGDRule):
    """Heavy ball, normalised."""

    steepest = True


@dataclass(frozen=True, kw_only=True)
class ObliqueSteepestAdamRule(ObliqueAdamRule):
    """Adam, normalised."""

    steepest = True


class ObliqueSGD(RuleOptimizer):
    """Heavy-ball SGD on columns or rows of unit norm; the equations are in this module's docstring.

    Update: tangent part of Σ μᵏ G, then unit columns or rows
    When to use it: as `oblique_adam`, with one state tensor
    When not to use it: weights whose length means something; gradients of unknown size, which the rate depends on

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = ObliqueSGD([w], lr=0.75)
        >>> w.grad = torch.tensor([[5.0, 0.0], [-1.0, 0.0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[0.8000, 0.0000],
                [0.6000, 1.0000]], requires_grad=True)
    """

    rule = ObliqueSGDRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 1e-3,
        momentum: Momentum = 0.9,
        weight_decay: ObliqueWeightDecay = 0.0,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        dim: Dim = 0,
        eps: ObliqueEps = 1e-8,
        scale_mode: ObliqueScale = "unit_l2_norm",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))


SteepestLearningRate = Annotated[LearningRate, "the tangent of the angle by which each column or row turns, >= 0."]


class ObliqueSteepestSGD(ObliqueSGD):
    """Momentum on columns or rows of one norm, each turned by one angle; the equations are in this module's docstring.

    Update: tangent part of Σ μᵏ G, every column or row of it with an RMS of 1
    When to use it: embeddings (`dim=1`): rare tokens move as far as frequent ones, with one state tensor
    When not to use it: a table that is tied to the head or starts small, without `scale_mode="unit_l2_norm"`

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = ObliqueSteepestSGD([w], lr=0.75, scale_mode="unit_l2_norm")
        >>> w.grad = torch.tensor([[5.0, 0.0], [-0.1, 0.0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[0.8000, 0.0000],
                [0.6000, 1.0000]], requires_grad=True)
    """

    rule = ObliqueSteepestSGDRule

    def __init__(
        self,
        params: MatrixParams,
        lr: SteepestLearningRate = 1e-3,
        momentum: Momentum = 0.9,
        weight_decay: ObliqueWeightDecay = 0.0,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        dim: Dim = 0,
        eps: ObliqueEps = 1e-8,
        scale_mode: ObliqueScale = "unit_rms_norm",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))


ObliqueAdamCorrectBias = Annotated[
    CorrectBiasT,
    Option(
        one_of(True, False, "published"),
        'divide the moments by 1 - beta^t; "published": divide the root of the second moment by it instead, '
        "which makes the first update sqrt(1 - beta2) times its right size.",
    ),
]


ObliqueAdamEps = Annotated[PositiveEps, "added to the root of the second moment; smaller norms count as this; > 0."]


class ObliqueAdam(RuleOptimizer):
    """Adam on columns or rows of unit norm; the equations are in this module's docstring.

    Update: tangent part of m̂ / (√v̂ + ε), then unit columns or rows
    When to use it: weights whose length means nothing: embeddings, heads, normalised layers
    When not to use it: weights whose length means something: every column or row is made 1 long

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = ObliqueAdam([w], lr=0.75)
        >>> w.grad = torch.tensor([[5.0, 0.0], [-1.0, 0.0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[0.8000, 0.0000],
                [0.6000, 1.0000]], requires_grad=True)
    """

    rule = ObliqueAdamRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 1e-3,
        betas: Annotated[Betas, "decay of the first and second moment, each in [0, 1)."] = (0.9, 0.99),
        weight_decay: ObliqueWeightDecay = 0.0,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        dim: Dim = 0,
        eps: ObliqueAdamEps = 1e-8,
        correct_bias: ObliqueAdamCorrectBias = True,
        scale_mode: ObliqueScale = "unit_l2_norm",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))


class ObliqueSteepestAdam(ObliqueAdam):
    """Adam on columns or rows of one norm, each turned by one angle; the equations are in this module's docstring.

    Update: tangent part of m̂ / (√v̂ + ε), every column or row of it with an RMS of 1
    When to use it: as `oblique_steepest_sgd`, where features differ in size
    When not to use it: rare tokens, unless you have compared: AdamW was better on Zipf's frequencies

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = ObliqueSteepestAdam([w], lr=0.75, scale_mode="unit_l2_norm")
        >>> w.grad = torch.tensor([[5.0, 0.0], [-0.1, 0.0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[0.8000, 0.0000],
                [0.6000, 1.0000]], requires_grad=True)
    """

    rule = ObliqueSteepestAdamRule

    def __init__(
        self,
        params: MatrixParams,
        lr: SteepestLearningRate = 1e-3,
        betas: Annotated[Betas, "decay of the first and second moment, each in [0, 1)."] = (0.9, 0.99),
        weight_decay: ObliqueWeightDecay = 0.0,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        dim: Dim = 0,
        eps: ObliqueAdamEps = 1e-8,
        correct_bias: ObliqueAdamCorrectBias = True,
        scale_mode: ObliqueScale = "unit_rms_norm",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
