r"""MAdam, magnitude-aware Adam: Adam without epsilon, for gradients of any size.

.. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) G_t \\
    v'_t &= \beta_2 v'_{t-1} + (1 - \beta_2) (2^{k/2} G_t)^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1}
        - \eta \, 2^{k/2} \frac{m_t / (1 - \beta_1^t)}{\sqrt{v'_t / (1 - \beta_2^t)}}

Adam's :math:`\epsilon` shortens the update of every element whose gradient is not far above it. Here nothing is added
to the denominator. So that squares of small gradients do not vanish in float32, the second moment is kept multiplied by
:math:`2^k`; k is even, so that the factor costs no rounding. Where the second moment is zero, because the gradient has
always been, the update is zero. In place of AdamW where gradients are very small: deep layers, tiny losses, large
batches. State: two tensors, 8 bytes a parameter.

References:
    Kingma and Ba 2015, Adam, arXiv 1412.6980.
    NVIDIA 2026, Emerging-Optimizers (the scaled second moment).
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import (
    Betas,
    Check,
    CorrectBias,
    LearningRate,
    Option,
    Params,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import FirstMoment, Like

EVEN = Check(lambda v: type(v) is int and v % 2 == 0, "an even integer")


class MAdamState(NamedTuple):
    """First moment, and second moment times 2^k, each shaped like the gradient."""

    exp_avg: FirstMoment
    exp_avg_sq_scaled: Like


def madam_direction(
    grad: Tensor, s: MAdamState, t: Scalars, *, correct_bias: bool, scale_log2: int
) -> tuple[Tensor, MAdamState]:
    """MAdam's direction and new moments, for a tensor of any shape; `t` has betas and step."""
    beta1, beta2 = t.betas
    bias1 = debias(beta1, t.step, grad) if correct_bias else 1.0
    bias2 = debias(beta2, t.step, grad) if correct_bias else 1.0
    scale = 2.0 ** (scale_log2 // 2)
    m = lerp(s.exp_avg, grad, 1 - beta1)
    v = lerp(s.exp_avg_sq_scaled, (grad * scale).square(), 1 - beta2)
    # The quotient before the scale: m scale can overflow where the quotient does not.
    direction = m / bias1 / (v / bias2).sqrt_() * scale
    return torch.where(v == 0, 0, direction), MAdamState(m, v)


def madam_largest_norm(unscaled: float, scale_log2: int) -> float:
    """What is left of the largest norm of a gradient when its square is kept times 2^k."""
    return unscaled / max(1.0, 2.0 ** (scale_log2 // 2))


@dataclass(frozen=True, kw_only=True)
class MAdamRule(Rule):
    """MAdam, element by element."""

    State = MAdamState
    reads = ("betas", "step")
    elementwise = True
    correct_bias: bool = True
    scale_log2: int = 16

    def largest_norm(self, dtype: torch.dtype) -> float:
        """The square is kept scaled."""
        return madam_largest_norm(super().largest_norm(dtype), self.scale_log2)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        return Step(*madam_direction(grad, state, t, correct_bias=self.correct_bias, scale_log2=self.scale_log2))


ScaleLog2 = Annotated[
    int,
    Option(
        EVEN,
        "k, an even integer: the second moment is kept times 2^k. In float32 squares of gradients above 1e-22 "
        "/ 2^(k/2) do not vanish, and those below 1e19 / 2^(k/2) do not overflow. A checkpoint has to be "
        "continued with the same k.",
    ),
]


class MAdam(RuleOptimizer):
    """MAdam; the equations are in this module's docstring.

    Update: m̂ / √v̂, v kept times 2^k
    When to use it: very small gradients, where Adam's ε shortens the update
    When not to use it: gradients well above Adam's ε, where it gives Adam's update

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = MAdam([w], lr=0.1)
        >>> w.grad = torch.tensor([1e-20, -2.0, 0.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000, 1.0000], requires_grad=True)
    """

    rule = MAdamRule

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Annotated[Betas, "decay of the first and second moment, each in [0, 1)."] = (0.9, 0.999),
        weight_decay: WeightDecay = 0.0,
        *,
        scale_log2: ScaleLog2 = 16,
        correct_bias: CorrectBias = True,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
