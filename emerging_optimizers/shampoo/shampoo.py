r"""Shampoo: momentum between the inverse roots of two Kronecker factors.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
    L_t &= \beta' L_{t-1} + (1 - \beta')\, G_t G_t^\top, \qquad
    R_t = \beta' R_{t-1} + (1 - \beta')\, G_t^\top G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta\, L_t^{-1/p} M_t R_t^{-1/p}

for an (M, N) matrix; L is (M, M), R is (N, N). :math:`\beta' = 1 - (1 - \beta) / (1 - \beta^t)` makes the factors
exact weighted means from the first step on. The root is damped,
:math:`\lambda^{1/p} / (\lambda^{2/p} + \epsilon^{2/p})` for each eigenvalue :math:`\lambda`, so that factors of less
than full rank need no start from :math:`\epsilon I`.

With p = 4 the update does not depend on the gradient's scale, and for a single gradient it is the polar factor: Muon is
Shampoo without memory in its factors. The momentum starts at zero and is not bias-corrected, so the first updates are
:math:`1 - \mu^t` of the later ones.

A side longer than `max_precond_dim` has no factor, and the other one takes the whole root, :math:`L^{-2/p} M` or
:math:`M R^{-2/p}`: Shampoo of one axis, which p = 4 leaves independent of the gradient's scale and the polar factor of
a single gradient, as both sides together are. With both sides longer it is SGD with momentum.

State for an M x N matrix: MN + M^2 + N^2 numbers, fewer than SOAP's; two eigendecompositions a step. For the hidden
matrices of a network, where memory for SOAP's second moment and bases is short, and as a baseline.

References:
    Gupta, Koren and Singer 2018, Shampoo: Preconditioned Stochastic Tensor Optimization, arXiv 1802.09568.
    Anil et al. 2020, Scalable Second Order Optimization for Deep Learning, arXiv 2002.09018: no factor of a long side,
        and exponents by the number of sides that have one.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import (
    COUNT,
    LearningRate,
    MatrixParams,
    MaxPrecondDim,
    Momentum,
    Option,
    PositiveEps,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import FactorL_BMM, FactorR_BNN, Momentum_BMN, before_first_step
from emerging_optimizers.engine.rule import Where
from emerging_optimizers.linalg.inverse_root import inverse_root
from emerging_optimizers.linalg.kernels.symmetric import gram


class ShampooState(NamedTuple):
    """Momentum and factors; a side that is too long has none."""

    exp_avg: Momentum_BMN
    L: FactorL_BMM
    R: FactorR_BNN


@dataclass(frozen=True, kw_only=True)
class ShampooRule(Rule):
    """Momentum and factors, then the momentum between their inverse roots."""

    State = ShampooState
    reads = ("momentum", "shampoo_beta", "eps", "step")
    p_root_inv: int = 4
    max_precond_dim: int | None = 10000

    def obstacle(self, where: Where) -> str | None:
        """The inverse roots ask the host."""
        if where.capturable:
            return "the host checks the success of an eigh in every step; use SOAP"
        return super().obstacle(where)

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ShampooState:
        """No factor of a side that is too long."""
        limit = self.max_precond_dim or max(shape)
        long = [side for side, size in zip("LR", shape[1:], strict=True) if size > limit]
        return before_first_step(ShampooState, shape, dtype, device, without=long)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: ShampooState = state
        momentum_BMN = lerp(s.exp_avg, grad, 1 - t.momentum)
        share = (1 - t.shampoo_beta) / debias(t.shampoo_beta, t.step, grad)
        L = None if s.L is None else lerp(s.L, gram(grad), share)
        R = None if s.R is None else lerp(s.R, gram(grad.mT), share)
        root = self.p_root_inv / (2 if L is None or R is None else 1)  # half of what two sides share is one's alone
        left, right = (None if factor is None else inverse_root(factor, root, t.eps) for factor in (L, R))
        update_BMN = momentum_BMN if left is None else left @ momentum_BMN
        update_BMN = update_BMN if right is None else update_BMN @ right
        return Step(update_BMN, ShampooState(momentum_BMN, L, R))


ShampooLearningRate = Annotated[
    LearningRate,
    "learning rate, >= 0. With p = 4 the RMS of an update of an M x N matrix is lr (M N)^(-1/4) times a number that "
    "grows with the agreement of successive gradients: sqrt((1 - mu) / (1 + mu)) for independent ones.",
]
PRootInv = Annotated[
    int,
    Option(
        COUNT,
        "p, an integer >= 1. 4 is Shampoo's; 2 whitens twice as much, and the update then shrinks as gradients grow.",
    ),
]


ShampooMaxPrecondDim = Annotated[
    MaxPrecondDim,
    "a side that is longer has no factor, and the other one takes the whole root; both longer: SGD with momentum. "
    "None: no limit.",
]


class Shampoo(RuleOptimizer):
    """Shampoo; the equations are in this module's docstring.

    Update: L^(−1/p) m R^(−1/p), p = 4
    When to use it: as a baseline; where memory for SOAP is short

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Shampoo([w], lr=0.1, momentum=0.0)
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
        >>> optimizer.step()
        >>> w.diagonal()
        tensor([-0.1000,  0.1000], grad_fn=<DiagonalBackward0>)
    """

    rule = ShampooRule

    def __init__(
        self,
        params: MatrixParams,
        lr: ShampooLearningRate,
        momentum: Momentum = 0.9,
        shampoo_beta: ShampooBeta = 0.95,
        eps: Annotated[PositiveEps, "eigenvalues of the factors below it are faded out, > 0."] = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        p_root_inv: PRootInv = 4,
        weight_decay_method: WeightDecayMethod = "decoupled",
        max_precond_dim: ShampooMaxPrecondDim = 10000,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
