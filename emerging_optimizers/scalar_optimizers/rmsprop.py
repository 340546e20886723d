r"""RMSProp: the gradient divided by a running root mean square of itself.

.. math::
    v_t &= \alpha v_{t-1} + (1 - \alpha) G_t^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, G_t / (\sqrt{v_t} + \epsilon)

v is not bias-corrected, so the first update is :math:`1 / \sqrt{1 - \alpha}` times the learning rate: 10 times at the
default. `LaProp` with betas (0, alpha) is the corrected form. State: one tensor, 4 bytes a parameter.

References:
    Tieleman and Hinton 2012, Lecture 6.5: RMSProp, Coursera, Neural Networks for Machine Learning.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import adam_
from emerging_optimizers.engine.options import (
    FRACTION,
    Eps,
    LearningRate,
    Option,
    Params,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Like
from emerging_optimizers.engine.rule import Kernel
from emerging_optimizers.engine.scalars import addcmul_


class RMSPropState(NamedTuple):
    """The second moment, shaped like the gradient."""

    exp_avg_sq: Like


@dataclass(frozen=True, kw_only=True)
class RMSPropRule(Rule):
    """RMSProp, element by element."""

    State = RMSPropState
    reads = ("alpha", "eps")
    elementwise = True

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        v = addcmul_(state.exp_avg_sq * t.alpha, grad, grad, 1 - t.alpha)
        return Step(grad / v.sqrt().add_(t.eps), RMSPropState(v))

    @property
    def kernel(self) -> Kernel | None:
        """torch's AdamW without memory in its first moment."""
        return self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        betas = (0.0, t.alpha)
        return adam_(weights, grads, None, state.exp_avg_sq, betas=betas, eps=t.eps, step=math.inf, lr=lr, keep=keep)


RMSPropWeightDecayMethod = Annotated[
    WeightDecayMethod, '"decoupled", "independent", "l2" (torch\'s), "palm" or "cautious".'
]


class RMSProp(RuleOptimizer):
    """RMSProp, equal to `torch.optim.RMSprop` without momentum; the equations are in this module's docstring.

    Update: G / (√v + ε)
    When to use it: no momentum wanted; old recipes
    When not to use it: wherever momentum helps, as it has none

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RMSProp([w], lr=0.01)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000], requires_grad=True)
    """

    rule = RMSPropRule

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        alpha: Annotated[float, Option(FRACTION, "decay of the second moment, in [0, 1).")] = 0.99,
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        *,
        weight_decay_method: RMSPropWeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
