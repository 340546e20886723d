r"""Scion: stochastic conditional gradients with operator norms.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, \rho \, \mathrm{lmo}(M_t)

With :math:`\lambda = 1` (the default) this is a Frank-Wolfe step: every weight stays in the ball of radius
:math:`\rho` of its norm once it is there. With :math:`\lambda = 0` it is the paper's unconstrained variant. The
norm, and with it :math:`-\mathrm{lmo}`, the point of the unit ball with the steepest descent, is chosen by parameter
group:

==========  =====================================================  ====================================================
norm        lmo of an M x N matrix X                               for
==========  =====================================================  ====================================================
spectral    :math:`\sqrt{M/N} \, U V^\top`                         hidden matrices
sign        :math:`\operatorname{sign}(X) / N`                     output heads; vectors (N = 1)
row         :math:`\sqrt N \, X_{i:} / \|X_{i:}\|` for each row    embeddings, stored as (vocabulary, width)
column      :math:`\sqrt M \, X_{:j} / \|X_{:j}\|` for each        first layers on one-hot input, stored as
            column                                                 (width, vocabulary)
rms         :math:`\sqrt{M N} \, X / \|X\|_F`                      vectors: biases, gains of norms
==========  =====================================================  ====================================================

So a whole model trains with Scion alone, one group a kind, and learning rates carry over from one width to another.
State: one tensor, 4 bytes a parameter.

References:
    Pethick et al. 2025, Training Deep Learning Models with Norm-Constrained LMOs, arXiv 2502.07529.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, Literal, Unpack, get_args

from torch import Tensor

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.options import (
    POSITIVE,
    LearningRate,
    MatrixParams,
    Momentum,
    NewtonSchulzSteps,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
)
from emerging_optimizers.engine.rule import Where
from emerging_optimizers.linalg.scaling import unit_norm
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumState, average
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    PolarRule,
)

ScionNormT = Literal["spectral", "sign", "row", "column", "rms"]


@dataclass(frozen=True, kw_only=True)
class ScionRule(PolarRule):
    """The steepest point of a norm's ball."""

    reads = ("momentum", "spectral_radius")
    norm: ScionNormT = "spectral"

    def obstacle(self, where: Where) -> str | None:
        """A vector of n is an (n, 1) matrix; the norms without a second axis make sense for it."""
        return super().obstacle(where._replace(ndim=2) if self.norm in ("sign", "rms") else where)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        rows, columns = grad.shape[-2:]
        if self.norm == "spectral":
            lmo_BMN = self.polar(ahead_BMN) * sqrt(rows / columns)
        elif self.norm == "sign":
            lmo_BMN = ahead_BMN.sign() / columns
        elif self.norm == "row":
            lmo_BMN = unit_norm(ahead_BMN, dim=-1) * sqrt(columns)
        elif self.norm == "column":
            lmo_BMN = unit_norm(ahead_BMN, dim=-2) * sqrt(rows)
        else:
            lmo_BMN = unit_norm(ahead_BMN, dim=(-2, -1)) * sqrt(rows * columns)
        return Step(lmo_BMN * t.spectral_radius, MomentumState(momentum_BMN))


ScionParams = Annotated[
    MatrixParams,
    'tensors, (name, tensor) pairs, or groups; vectors only with norm "sign" or "rms". 3-D: a batch of '
    "matrices; convolutions are flattened to (out, rest).",
]
ScionLearningRate = Annotated[
    LearningRate,
    "learning rate, >= 0; with weight_decay=1 at most 1. The RMS of a spectral update of an M x N matrix is lr rho "
    "sqrt(M / N / max(M, N)).",
]
SpectralRadius = Annotated[
    float,
    Option(
        POSITIVE,
        "rho, the radius of the ball of whichever norm, > 0. The paper's language models use 50 for hidden "
        "matrices and 3000 for the embedding and the head.",
    ),
]
Norm = Annotated[ScionNormT, Option(one_of(*get_args(ScionNormT)), '"spectral", "sign", "row", "column" or "rms".')]


class Scion(PolarOptimizer):
    """Scion; the equations and the norms are in this module's docstring.

    Update: ρ lmo(m): √(M/N) O, sign, row, column or RMS norm by group
    When to use it: a whole model without Adam; rates that carry over widths
    When not to use it: with a rate of AdamW, unless `match` translates it: the rate is a part of a norm ball's
        radius

    Raises:
        ValueError: a value out of its range, or a vector where the norm is about matrices.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
        >>> embedding, hidden, bias, head, head_bias = model.parameters()
        >>> optimizer = Scion(
        ...     [
        ...         {"params": [embedding], "norm": "row"},
        ...         {"params": [hidden]},
        ...         {"params": [head], "norm": "sign"},
        ...         {"params": [bias, head_bias], "norm": "rms"},
        ...     ],
        ...     lr=0.1,
        ... )
        >>> model(torch.arange(9)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ScionRule

    def __init__(
        self,
        params: ScionParams,
        lr: ScionLearningRate = 3e-4,
        momentum: Momentum = 0.95,
        *,
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        spectral_radius: SpectralRadius = 1.0,
        norm: Norm = "spectral",
        weight_decay: Annotated[WeightDecay, "1: constrained to the ball; 0: unconstrained."] = 1.0,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))
