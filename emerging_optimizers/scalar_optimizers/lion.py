r"""Lion: the sign of an interpolated momentum.

.. math::
    U_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) G_t) \\
    m_t &= \beta_2 m_{t-1} + (1 - \beta_2) G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, U_t

One state tensor, every element moves by the learning rate: use a third to a tenth of AdamW's, with three to ten
times its weight decay.

References:
    Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Scalars, Step, lerp
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import sign_of_average_
from emerging_optimizers.engine.options import Betas, LearningRate, Params, WeightDecay, WeightDecayMethod, given
from emerging_optimizers.engine.parts import Decay, Part
from emerging_optimizers.engine.rule import Kernel, TranslatesState
from emerging_optimizers.scalar_optimizers.base import SingleMomentumOptimizer


class LionState(NamedTuple):
    """The momentum, shaped like the gradient."""

    exp_avg: Annotated[Tensor, Part(rounds=True, averages=Decay("betas", 1))]


@dataclass(frozen=True, kw_only=True)
class LionRule(TranslatesState):
    """Lion, element by element."""

    State = LionState
    reads = ("betas",)
    elementwise = True

    def translate(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """August 2026 counts steps, and never reads them."""
        return {key: value for key, value in saved.items() if key != "step"}

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        beta1, beta2 = t.betas
        direction = lerp(state.exp_avg, grad, 1 - beta1).sign_()
        return Step(direction, LionState(lerp(state.exp_avg, grad, 1 - beta2)))

    @property
    def kernel(self) -> Kernel | None:
        """The momentum moves in place, after the direction has been read from it."""
        return self._in_place

    def _in_place(
        self, weights: list[Tensor], grads: list[Tensor], state: Any, t: Scalars, lr: float, keep: float
    ) -> list[Write]:
        return sign_of_average_(weights, grads, state.exp_avg, t.betas, lr=lr, keep=keep)


LionBetas = Annotated[Betas, "weight of the old momentum in the update, and decay of the momentum; each in [0, 1)."]


class Lion(SingleMomentumOptimizer):
    """Lion; the equations are in this module's docstring.

    Update: sign(β₁ m + (1 − β₁) G)
    When to use it: half of Adam's memory
    When not to use it: where a tuned AdamW fits in memory: on the demo Lion ended at 2.399 and AdamW at 2.265

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Lion([w], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([0.9000, 1.1000], requires_grad=True)
    """

    rule = LionRule

    def __init__(
        self,
        params: Params,
        lr: Annotated[LearningRate, "learning rate, >= 0: by how much every element moves."] = 1e-4,
        betas: LionBetas = (0.9, 0.99),
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
