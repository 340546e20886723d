r"""Sinkhorn: momentum whose rows and columns are divided by their norms in turn; for embeddings.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t, \qquad N_t = \mu M_t + (1 - \mu) G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, c \, S(N_t)

S is `linalg.sinkhorn.balance`: rows whose norm is at most a thousandth of the mean are left out, then rows and columns
get unit norm in turn, eleven times, rows last, and the result is scaled so that every row has an RMS of 1. So the rows
of rare tokens move as far as those of frequent ones, and no feature is favoured; a row whose token has not come for
long stands still. c is 0.18, by which a learning rate of AdamW can be kept.

For tables of tokens and output heads, (tokens, features). State: one tensor, 4 bytes a parameter, half of AdamW's.

References:
    DeepSeek-AI 2026, DeepSeek-V4.1 technical report, algorithm 1.
    Scetbon et al. 2025, Gradient Multi-Normalization for Stateless and Scalable LLM Training, arXiv 2502.06742.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.options import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    Check,
    LearningRate,
    MatrixParams,
    Momentum,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.linalg.sinkhorn import balance
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumState, average


@dataclass(frozen=True, kw_only=True)
class SinkhornRule(Rule):
    """Momentum, balanced."""

    State = MomentumState
    reads = ("momentum",)
    num_steps: int = 11
    zero_row_threshold: float = 1e-3
    lr_correction: float = 0.18

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=True)
        balanced_BMN = balance(ahead_BMN, self.num_steps, self.zero_row_threshold)
        return Step(balanced_BMN * self.lr_correction, MomentumState(momentum_BMN))


ODD = Check(lambda v: COUNT.holds(v) and v % 2 == 1, "an odd integer >= 1")


class Sinkhorn(RuleOptimizer):
    """Sinkhorn; the equations are in this module's docstring.

    Update: rows and columns of the momentum by their norms in turn, every row with an RMS of 0.18
    When to use it: embeddings and heads, with half of AdamW's state
    When not to use it: tables of common tokens: nothing was gained on the demo's

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = Sinkhorn([w], lr=0.1, lr_correction=1.0)
        >>> w.grad = torch.tensor([[5.0, 5.0], [0.1, -0.1], [0.0, 0.0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[-0.1000, -0.1000],
                [-0.1000,  0.1000],
                [ 0.0000,  0.0000]], requires_grad=True)
    """

    rule = SinkhornRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 3e-3,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.0,
        *,
        num_steps: Annotated[
            int, Option(ODD, "divisions of rows and columns, an odd number, so that rows are last.")
        ] = 11,
        zero_row_threshold: Annotated[
            float, Option(NON_NEGATIVE, "rows stand still whose norm is at most this share of the mean norm, >= 0.")
        ] = 1e-3,
        lr_correction: Annotated[float, Option(POSITIVE, "multiplies the update, > 0.")] = 0.18,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
