r"""AdEMAMix: Adam with a second, much slower momentum.

.. math::
    m^f_t &= \beta_f m^f_{t-1} + (1 - \beta_f) G_t \\
    m^s_t &= \beta_s(t)\, m^s_{t-1} + (1 - \beta_s(t))\, G_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) G_t^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1}
        - \eta \frac{m^f_t / (1 - \beta_f^t) + \alpha(t)\, m^s_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

The slow average (half-life of 7,000 steps at the default) still listens to gradients that Adam has long forgotten. It
is not bias-corrected, so that it grows into the update. Over the first T steps :math:`\alpha(t) = \alpha\, t / T`, and
the half-life of :math:`\beta_s(t)` grows linearly from that of :math:`\beta_f` (`half_life_warmup`). For runs of many
thousand steps; T is usually all of them. State: three tensors, 12 bytes a parameter.

References:
    Pagliardini, Ablin and Grangier 2024, The AdEMAMix Optimizer: Better, Faster, Older, arXiv 2409.03137.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, debias
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import adam_of_averages_
from emerging_optimizers.engine.options import (
    COUNT,
    FRACTION,
    NON_NEGATIVE,
    Check,
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
from emerging_optimizers.engine.parts import FirstMoment, Like
from emerging_optimizers.engine.rule import Kernel
from emerging_optimizers.engine.scalars import add_, addcmul_, lerp

THREE_BETAS = Check(
    lambda v: isinstance(v, tuple) and len(v) == 3 and all(map(FRACTION.holds, v)), "three numbers in [0, 1)"
)


def warmup(step: Any, num_steps: int | None) -> Any:
    """min(1, step / num_steps); 1 without a warm-up. Numbers or tensors."""
    if num_steps is None:
        return 1.0
    share = step / num_steps
    return share.clamp(max=1.0) if isinstance(share, Tensor) else min(1.0, share)


def half_life_warmup(step: Any, beta_start: Any, beta_end: Any, num_steps: int | None) -> Any:
    r"""A decay whose half-life :math:`\ln \tfrac12 / \ln \beta` grows linearly over `num_steps` steps.

    Example:
        >>> [round(half_life_warmup(step, 0.5, 0.5**0.25, 2), 4) for step in (0, 1, 2, 9)]  # half-lives 1, 2.5, 4, 4
        [0.5, 0.7579, 0.8409, 0.8409]
    """
    if num_steps is None:
        return beta_end
    done = warmup(step, num_steps)
    exponent = 1 / ((1 - done) / _log(beta_start) + done / _log(beta_end))
    return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)


def _log(beta: Any) -> Any:
    # A decay of zero has a half-life of zero; so, nearly, has this one.
    return beta.clamp_min(1e-8).log() if isinstance(beta, Tensor) else math.log(max(beta, 1e-8))


class AdEMAMixState(NamedTuple):
    """Fast and slow first moment and second moment, each shaped like the gradient."""

    exp_avg_fast: FirstMoment
    exp_avg_slow: Like
    exp_avg_sq: Like


@dataclass(frozen=True, kw_only=True)
class AdEMAMixRule(Rule):
    """AdEMAMix, element by element."""

    State = AdEMAMixState
    reads = ("betas", "eps", "alpha", "step")
    elementwise = True
    correct_bias: bool = True
    num_beta_slow_warmup_steps: int | None = None
    num_alpha_warmup_steps: int | None = None

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        beta_fast, beta2, beta_slow = t.betas
        beta_slow = half_life_warmup(t.step, beta_fast, beta_slow, self.num_beta_slow_warmup_steps)
        alpha = t.alpha * warmup(t.step, self.num_alpha_warmup_steps)
        fast = lerp(state.exp_avg_fast, grad, 1 - beta_fast)
        slow = lerp(state.exp_avg_slow, grad, 1 - beta_slow)
        v = addcmul_(state.exp_avg_sq * beta2, grad, grad, 1 - beta2)

        bias_fast = debias(beta_fast, t.step, grad) if self.correct_bias else 1.0
        bias2 = debias(beta2, t.step, grad) if self.correct_bias else 1.0
        # Numerator and denominator both times the root of bias2, which then takes no pass of its own.
        root2 = bias2**0.5
        numerator = add_(fast * (root2 / bias_fast), slow, root2 * alpha)
        return Step(numerator.div_(v.sqrt().add_(t.eps * root2)), AdEMAMixState(fast, slow, v))

    @property
    def kernel(self) -> Kernel | None:
        """torch's AdamW behind its SGD, twice, whose momenta are the averages."""
        return self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        (fast, slow, v), (beta_fast, beta2, beta_slow) = state, t.betas
        beta_slow = half_life_warmup(t.step, beta_fast, beta_slow, self.num_beta_slow_warmup_steps)
        # As the kernel rounds it: what is left for the gradient is so small that the two would not add up to 1.
        beta_slow = torch.tensor(beta_slow, dtype=grads[0].dtype, device="cpu").item()
        alpha = t.alpha * warmup(t.step, self.num_alpha_warmup_steps)
        step = t.step if self.correct_bias else math.inf
        averages = (
            (fast, beta_fast, 1 - beta_fast, 1 / (1 - beta_fast**step)),
            (slow, beta_slow, 1 - beta_slow, alpha),
        )
        return adam_of_averages_(weights, grads, averages, 0.0, v, beta2=beta2, eps=t.eps, step=step, lr=lr, keep=keep)


AdEMAMixBetas = Annotated[
    tuple[float, float, float],
    Option(
        THREE_BETAS,
        "decay of the fast first moment, of the second moment, and of the slow first moment; each in [0, 1).",
    ),
]
Alpha = Annotated[float, Option(NON_NEGATIVE, "weight of the slow moment, >= 0; 4 to 10 for long runs. 0: Adam.")]
NumBetaSlowWarmupSteps = Annotated[
    int | None, Option(optional(COUNT), "steps over which the slow moment slows down, >= 1; None: slow from the start.")
]
NumAlphaWarmupSteps = Annotated[
    int | None, Option(optional(COUNT), "steps over which alpha grows from 0, >= 1; None: alpha from the start.")
]


class AdEMAMix(RuleOptimizer):
    """AdEMAMix; the equations are in this module's docstring.

    Update: (m̂ + α m_slow) / (√v̂ + ε)
    When to use it: runs of many thousand steps, with both warm-ups over the whole run
    When not to use it: short runs, in which the slow momentum does not fill; memory for three states is short

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdEMAMix([w], lr=0.1, num_alpha_warmup_steps=100, num_beta_slow_warmup_steps=100)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000], requires_grad=True)
    """

    rule = AdEMAMixRule

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: AdEMAMixBetas = (0.9, 0.999, 0.9999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        *,
        alpha: Alpha = 2.0,
        correct_bias: Annotated[CorrectBias, "divide the fast and the second moment by 1 - beta^t."] = True,
        num_beta_slow_warmup_steps: NumBetaSlowWarmupSteps = None,
        num_alpha_warmup_steps: NumAlphaWarmupSteps = None,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
