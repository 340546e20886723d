r"""AdamW: Adam with decoupled weight decay.

.. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) G_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) G_t^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1}
        - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

With nesterov the numerator is :math:`\beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) G_t / (1 - \beta_1^t)`.

The default for vectors, embeddings and heads, and the baseline of every comparison.

References:
    Kingma and Ba 2015, Adam, arXiv 1412.6980. Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization,
    arXiv 1711.05101. Dozat 2016, Incorporating Nesterov Momentum into Adam.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import adam_
from emerging_optimizers.engine.options import (
    Betas,
    CorrectBias,
    Eps,
    LearningRate,
    Nesterov,
    Params,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import FirstMoment, Like
from emerging_optimizers.engine.rule import Kernel


class AdamState(NamedTuple):
    """First and second moment, each shaped like the gradient."""

    exp_avg: FirstMoment
    exp_avg_sq: Like


def adam_direction(
    grad: Tensor, s: AdamState, t: Scalars, *, correct_bias: bool = True, nesterov: bool = False
) -> tuple[Tensor, AdamState]:
    """Adam's direction and new moments, for a tensor of any shape; `t` has betas, eps, step."""
    beta1, beta2 = t.betas
    m = lerp(s.exp_avg, grad, 1 - beta1)
    v = lerp(s.exp_avg_sq, grad.square(), 1 - beta2)

    bias1 = debias(beta1, t.step, grad) if correct_bias else 1.0
    bias2 = debias(beta2, t.step, grad) if correct_bias else 1.0
    if nesterov:
        ahead = debias(beta1, t.step + 1, grad) if correct_bias else 1.0
        numerator = m * (beta1 / ahead) + grad * ((1 - beta1) / bias1)
    else:
        numerator = m / bias1
    return numerator.div_((v / bias2).sqrt_().add_(t.eps)), AdamState(m, v)


@dataclass(frozen=True, kw_only=True)
class AdamWRule(Rule):
    """Adam, element by element."""

    State = AdamState
    reads = ("betas", "eps", "step")
    elementwise = True
    correct_bias: bool = True
    nesterov: bool = False

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        return Step(*adam_direction(grad, state, t, correct_bias=self.correct_bias, nesterov=self.nesterov))

    @property
    def kernel(self) -> Kernel | None:
        """torch's AdamW, which reads and writes every number once. Not with Nesterov momentum."""
        return None if self.nesterov else self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        m, v = state
        step = t.step if self.correct_bias else math.inf
        return adam_(weights, grads, m, v, betas=t.betas, eps=t.eps, step=step, lr=lr, keep=keep)


class AdamW(RuleOptimizer):
    """AdamW, equal to `torch.optim.AdamW`; the equations are in this module's docstring.

    Update: m̂ / (√v̂ + ε)
    When to use it: the baseline; beside every matrix optimizer; `nesterov=True` is NAdamW
    When not to use it: where a lower loss in the same steps counts: Muon and SOAP ended 0.5 and 0.6 lower on the
        demo

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamW([w], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000], requires_grad=True)
    """

    rule = AdamWRule

    def __init__(
        self,
        params: Params,
        lr: Annotated[LearningRate, "learning rate, >= 0, a number or a 0-D tensor."] = 1e-3,
        betas: Annotated[Betas, "decay of the first and second moment, each in [0, 1)."] = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 1e-2,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        correct_bias: CorrectBias = True,
        nesterov: Annotated[Nesterov, "look one step ahead (NAdamW)."] = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
