r"""MARS: AdamW on a gradient whose noise is reduced by the previous one.

.. math::
    C_t &= G_t + \gamma \frac{\beta_1}{1 - \beta_1} (G_t - G_{t-1}), \qquad G_0 = 0 \\
    \tilde C_t &= C_t / \max(1, \|C_t\|_F) \\
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \tilde C_t, \qquad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde C_t^2 \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

The difference of two gradients says where the gradient is going, and :math:`m_t` then lags behind it less. It
is what the authors call MARS-approx: both gradients are those that were computed anyway, of two batches; the exact form
computes the gradient of the new batch at the old weights, too. The norm is that of a whole matrix, so this is an
optimizer of matrices: vectors, tables and heads belong to AdamW, as in the authors' runs.

State: three tensors, 12 bytes a parameter: both moments and the previous gradient.

References:
    Yuan et al. 2024, MARS: Unleashing the Power of Variance Reduction for Training Large Models, arXiv 2411.10438.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor
from torch.linalg import vector_norm

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.options import (
    NON_NEGATIVE,
    Betas,
    Eps,
    LearningRate,
    MatrixParams,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Like, Part
from emerging_optimizers.scalar_optimizers.adamw import AdamState, adam_direction


class MARSState(NamedTuple):
    """Moments, and the gradient of the last step."""

    exp_avg: Annotated[Tensor, Part(rounds=True)]  # of corrected gradients
    exp_avg_sq: Like
    last_grad: Like


@dataclass(frozen=True, kw_only=True)
class MARSRule(Rule):
    """AdamW of the corrected gradient."""

    State = MARSState
    reads = ("betas", "eps", "gamma", "step")

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        beta1, _ = t.betas
        corrected_BMN = grad + (t.gamma * beta1 / (1 - beta1)) * (grad - state.last_grad)
        norm_B11 = vector_norm(corrected_BMN, dim=(-2, -1), keepdim=True)
        direction_BMN, moments = adam_direction(
            corrected_BMN / norm_B11.clamp_min(1), AdamState(state.exp_avg, state.exp_avg_sq), t
        )
        return Step(direction_BMN, MARSState(*moments, grad.clone()))


class MARS(RuleOptimizer):
    """MARS; the equations are in this module's docstring.

    Update: m̂ / (√v̂ + ε) of G + γ β₁/(1 − β₁) (G − G_old), cut to a norm of 1
    When to use it: noisy gradients, as a longer-sighted AdamW for matrices
    When not to use it: where Muon can be had: on the demo it ended at 2.236 and Muon at 1.739

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = MARS([w], lr=0.1)
        >>> w.grad = torch.tensor([[0.3, -0.4]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[-0.1000,  0.1000]], requires_grad=True)
    """

    rule = MARSRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 3e-3,
        betas: Betas = (0.95, 0.99),
        eps: Eps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        gamma: Annotated[
            float, Option(NON_NEGATIVE, "strength of the correction, >= 0; 0: AdamW of a cut gradient.")
        ] = 0.025,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
