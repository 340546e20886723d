r"""Simplified AdEMAMix: one slow momentum, and the gradient itself in place of the fast one.

.. math::
    m_t &= \beta(t)\, m_{t-1} + G_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) G_t^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1}
        - \eta \frac{\alpha G_t + m_t (1 - \beta(t)) / (1 - \beta(t)^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

Nearly what AdEMAMix does, with Adam's memory. The half-life of :math:`\beta(t)` can grow over the first steps
(`half_life_warmup`). Updates are up to :math:`1 + \alpha` times Adam's, so use a smaller learning rate. State: two
tensors, 8 bytes a parameter.

References:
    Morwani et al. 2025, Connections between Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants,
    arXiv 2502.02431. Pagliardini, Ablin and Grangier 2024, The AdEMAMix Optimizer, arXiv 2409.03137.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, Scalars, Step, debias
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import adam_of_averages_
from emerging_optimizers.engine.options import (
    COUNT,
    FRACTION,
    NON_NEGATIVE,
    Betas,
    CorrectBias,
    Eps,
    LearningRate,
    Option,
    Params,
    WeightDecay,
    WeightDecayMethod,
    given,
    optional,
)
from emerging_optimizers.engine.parts import Decay, Like, Part
from emerging_optimizers.engine.rule import Kernel
from emerging_optimizers.engine.scalars import add_, addcmul_
from emerging_optimizers.scalar_optimizers.ademamix import half_life_warmup
from emerging_optimizers.scalar_optimizers.base import TwoMomentsOptimizer


class SumState(NamedTuple):
    """The momentum, a sum, and the second moment, each shaped like the gradient."""

    exp_avg: Annotated[Tensor, Part(rounds=True, averages=Decay())]
    exp_avg_sq: Like


@dataclass(frozen=True, kw_only=True)
class SimplifiedAdEMAMixRule(Rule):
    """Simplified AdEMAMix, element by element."""

    State = SumState
    reads = ("betas", "eps", "alpha", "min_beta_fast", "step")
    elementwise = True
    correct_bias: bool = True
    num_beta_fast_warmup_steps: int | None = None

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        beta1, beta2 = t.betas
        beta1 = half_life_warmup(t.step, t.min_beta_fast, beta1, self.num_beta_fast_warmup_steps)
        bias1 = debias(beta1, t.step, grad) / (1 - beta1) if self.correct_bias else 1.0
        bias2 = debias(beta2, t.step, grad) if self.correct_bias else 1.0
        m = (state.exp_avg * beta1).to(grad.dtype).add_(grad)
        v = addcmul_(state.exp_avg_sq * beta2, grad, grad, 1 - beta2)
        # Numerator and denominator both times the root of bias2, which then takes no pass of its own. Step counts
        # that differ from element to element make bias1 a float64 stack.
        root2 = bias2**0.5
        numerator = add_((m * (root2 / bias1)).to(grad.dtype), grad, root2 * t.alpha)
        return Step(numerator.div_(v.sqrt().add_(t.eps * root2)), SumState(m, v))

    @property
    def kernel(self) -> Kernel | None:
        """torch's AdamW behind its SGD, whose momentum is the sum."""
        return self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        (m, v), (beta1, beta2) = state, t.betas
        beta1 = half_life_warmup(t.step, t.min_beta_fast, beta1, self.num_beta_fast_warmup_steps)
        step = t.step if self.correct_bias else math.inf
        averages = ((m, beta1, 1.0, (1 - beta1) / (1 - beta1**step) if self.correct_bias else 1.0),)
        return adam_of_averages_(
            weights, grads, averages, t.alpha, v, beta2=beta2, eps=t.eps, step=step, lr=lr, keep=keep
        )


SimplifiedAdEMAMixBetas = Annotated[
    Betas, "decay of the momentum (by its published name the fast one) and of the second moment, each in [0, 1)."
]
SimplifiedAdEMAMixCorrectBias = Annotated[
    CorrectBias,
    "make averages of the moments: the momentum times (1 - beta) / (1 - beta^t), the second moment over 1 "
    "- beta2^t. False: the momentum is the plain sum, up to 1 / (1 - beta) gradients.",
]
NumBetaFastWarmupSteps = Annotated[
    int | None, Option(optional(COUNT), "steps over which the momentum slows down, >= 1; None: slow from the start.")
]
MinBetaFast = Annotated[float, Option(FRACTION, "where the decay of the momentum begins then, in [0, 1).")]


class SimplifiedAdEMAMix(TwoMomentsOptimizer):
    """Simplified AdEMAMix; the equations are in this module's docstring.

    Update: (α G + m̂_slow) / (√v̂ + ε)
    When to use it: as AdEMAMix, with Adam's memory
    When not to use it: short runs, as for AdEMAMix

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SimplifiedAdEMAMix([w], lr=0.1, alpha=2.0)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.7000, 1.3000], requires_grad=True)
    """

    rule = SimplifiedAdEMAMixRule

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: SimplifiedAdEMAMixBetas = (0.9999, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        *,
        correct_bias: SimplifiedAdEMAMixCorrectBias = True,
        num_beta_fast_warmup_steps: NumBetaFastWarmupSteps = None,
        min_beta_fast: MinBetaFast = 0.9,
        alpha: Annotated[float, Option(NON_NEGATIVE, "weight of the gradient itself, >= 0. 0: Adam.")] = 2.0,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
