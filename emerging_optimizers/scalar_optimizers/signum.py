r"""Signum: the sign of the momentum.

.. math::
    m_t &= \beta m_{t-1} + (1 - \beta) G_t \\
    U_t &= \operatorname{sign}(m_t) \quad\text{or, with nesterov,}\quad
        \operatorname{sign}\!\left(\frac{\beta\, m_t}{1 - \beta^{t+1}} + \frac{(1 - \beta)\, G_t}{1 - \beta^t}\right) \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, s \, U_t

Every element moves by the learning rate; momentum 0 is signSGD. s is 1 or, with `use_shape_scaling`, 2 / (M + N) for an
(M, N) matrix: then learning rates carry over from one width to another. State: one tensor, 4 bytes a parameter.

References:
    Bernstein et al. 2018, signSGD: Compressed Optimisation for Non-Convex Problems, arXiv 1802.04434.
    Frans, Levine and Abbeel 2025, A Stable Whitening Optimizer, arXiv 2506.07254 (the scale).
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, Scalars, Step, debias
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import sign_of_average_
from emerging_optimizers.engine.options import (
    FLAG,
    CorrectBias,
    LearningRate,
    Momentum,
    Nesterov,
    Option,
    Params,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Decay, Part
from emerging_optimizers.engine.rule import Kernel
from emerging_optimizers.engine.scalars import lerp
from emerging_optimizers.scalar_optimizers.base import SingleMomentumOptimizer


class SignumState(NamedTuple):
    """The momentum, shaped like the gradient."""

    exp_avg: Annotated[Tensor, Part(rounds=True, averages=Decay("momentum"))]


@dataclass(frozen=True, kw_only=True)
class SignumRule(Rule):
    """Signum; element by element unless the shape of the matrix matters."""

    State = SignumState
    reads = ("momentum", "step")
    correct_bias: bool = True
    nesterov: bool = False
    use_shape_scaling: bool = False

    @property
    def elementwise(self) -> bool:  # type: ignore[override]  # here it depends on an option
        """With shape scaling the rule has to see whole matrices."""
        return not self.use_shape_scaling

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        m = lerp(state.exp_avg, grad, 1 - t.momentum)
        ahead = m
        if self.nesterov:
            bias = debias(t.momentum, t.step, grad) if self.correct_bias else 1.0
            bias_ahead = debias(t.momentum, t.step + 1, grad) if self.correct_bias else 1.0
            ahead = m * (t.momentum / bias_ahead) + grad * ((1 - t.momentum) / bias)
        direction = ahead.sign()
        if self.use_shape_scaling:
            direction.mul_(2 / sum(grad.shape[-2:]))
        return Step(direction, SignumState(m))

    @property
    def kernel(self) -> Kernel | None:
        """The momentum moves in place, after the direction has been read from it. Not with Nesterov momentum."""
        return None if self.nesterov else self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        betas = (t.momentum, t.momentum)
        return sign_of_average_(weights, grads, state.exp_avg, betas, lr=lr, keep=keep)


SignumCorrectBias = Annotated[
    CorrectBias, "divide by 1 - beta^t. It scales the momentum as a whole, so that only nesterov sees it."
]
UseShapeScaling = Annotated[
    bool,
    Option(
        FLAG,
        "multiply the update by 2 / (rows + columns); then vectors are refused, and 3-D parameters and "
        "convolutions are taken as matrices, as by any matrix optimizer.",
    ),
]


class Signum(SingleMomentumOptimizer):
    """Signum; the equations are in this module's docstring.

    Update: sign(m)
    When to use it: Lion with one β; learning rates across widths with `use_shape_scaling`
    When not to use it: gradients whose small entries are noise: every element moves by the same length

    Raises:
        ValueError: a value out of its range, or a vector where the shape matters.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Signum([w], lr=0.1)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000], requires_grad=True)
    """

    rule = SignumRule

    def __init__(
        self,
        params: Params,
        lr: Annotated[LearningRate, "learning rate, >= 0: by how much every element moves."] = 1e-3,
        momentum: Annotated[Momentum, "beta, in [0, 1)."] = 0.9,
        weight_decay: WeightDecay = 0.0,
        *,
        correct_bias: SignumCorrectBias = True,
        nesterov: Nesterov = False,
        use_shape_scaling: UseShapeScaling = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
