r"""LaProp: Adam that normalises the gradient before it enters the momentum.

.. math::
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) G_t^2 \\
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \frac{G_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, m_t / (1 - \beta_1^t)

Momentum and adaptivity are decoupled: a spike is divided by itself before it can fill the momentum, and
:math:`\beta_2` may be much smaller than Adam allows.

References:
    Ziyin, Wang and Ueda 2020, LaProp: Separating Momentum and Adaptivity in Adam, arXiv 2002.04839.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, Scalars, Step, debias
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import adam_, subtract_
from emerging_optimizers.engine.hooks import KeepNorm
from emerging_optimizers.engine.options import (
    FLAG,
    Betas,
    CorrectBias,
    Eps,
    LearningRate,
    Option,
    Params,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Like, Part
from emerging_optimizers.engine.rule import Kernel
from emerging_optimizers.engine.scalars import addcdiv_, addcmul_
from emerging_optimizers.scalar_optimizers.base import TwoMomentsOptimizer


class LaPropState(NamedTuple):
    """The momentum of normalised gradients, and the second moment, each shaped like the gradient."""

    exp_avg: Annotated[Tensor, Part(rounds=True)]
    exp_avg_sq: Like


@dataclass(frozen=True, kw_only=True)
class LaPropRule(Rule):
    """LaProp, element by element."""

    State = LaPropState
    reads = ("betas", "eps", "step")
    elementwise = True
    correct_bias: bool = True
    frob_normalize: bool = False

    @property
    def weight_law(self) -> KeepNorm | None:
        """With `frob_normalize`, the weight keeps its norm."""
        return KeepNorm() if self.frob_normalize else None

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        beta1, beta2 = t.betas
        bias1 = debias(beta1, t.step, grad) if self.correct_bias else 1.0
        bias2 = debias(beta2, t.step, grad) if self.correct_bias else 1.0
        v = addcmul_(state.exp_avg_sq * beta2, grad, grad, 1 - beta2)
        # G / (sqrt(v / bias2) + eps) with the root of bias2 taken out: a pass less.
        root2 = bias2**0.5
        m = addcdiv_(state.exp_avg * beta1, grad, v.sqrt().add_(t.eps * root2), (1 - beta1) * root2)
        return Step(m * (1 / bias1), LaPropState(m, v))

    @property
    def kernel(self) -> Kernel | None:
        """torch's AdamW, for which the momentum is the weight that decays; then its SGD."""
        return self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        (m, v), (beta1, beta2) = state, t.betas
        step = t.step if self.correct_bias else math.inf
        fit = adam_(m, grads, None, v, betas=(0.0, beta2), eps=t.eps, step=step, lr=beta1 - 1, keep=beta1)
        return [*fit, *subtract_(weights, m, lr / (1 - beta1**step), keep)]


LaPropBetas = Annotated[
    Betas,
    "decay of the momentum and of the second moment, each in [0, 1). A beta2 far below Adam's (0.65, say) "
    "forgets a spike in a few steps.",
]
FrobNormalize = Annotated[
    bool,
    Option(
        FLAG,
        "rescale every parameter to the Frobenius norm that it had before the step; weight decay is then "
        "undone by it, and a warning says so.",
    ),
]


class LaProp(TwoMomentsOptimizer):
    """LaProp; the equations are in this module's docstring.

    Update: average of G / (√v̂ + ε)
    When to use it: gradient spikes; small β₂
    When not to use it: hidden matrices, if Muon is possible: it ended 0.48 lower on the demo

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = LaProp([w], lr=0.1)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000], requires_grad=True)
    """

    rule = LaPropRule

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: LaPropBetas = (0.9, 0.999),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.0,
        *,
        correct_bias: CorrectBias = True,
        frob_normalize: FrobNormalize = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))

    @classmethod
    def _announce(cls, group: Any) -> None:
        if group["frob_normalize"] and group["weight_decay"] and group["weight_decay_method"] != "l2":
            warnings.warn(
                f"LaProp: frob_normalize=True gives each weight its norm back, so weight_decay="
                f"{group['weight_decay']} has no effect on the norm; set weight_decay=0",
                UserWarning,
                stacklevel=2,
            )
