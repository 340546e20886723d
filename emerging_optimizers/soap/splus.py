r"""SPlus: the sign of the momentum in the eigenbasis of Shampoo's Kronecker factors.

.. math::
    L_t &= \beta_s L_{t-1} + (1 - \beta_s)\, G_t G_t^\top, \qquad
    R_t = \beta_s R_{t-1} + (1 - \beta_s)\, G_t^\top G_t \\
    M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
    Q_L, Q_R &\leftarrow \text{eigenvectors of } L_t, R_t \text{, every hundredth step} \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \frac{2}{M + N}\, Q_L \operatorname{sign}(Q_L^\top M_t Q_R)\, Q_R^\top

for an (M, N) matrix. Every entry in the eigenbasis moves by the same amount, however old the basis is, so that the
update cannot grow while bases wait: its RMS is 2 / (M + N), by which one rate serves all widths. The momentum
is in the parameter's own space and does not turn with the bases. The first step has the identity for its basis and is
that of signed momentum; the second has the first eigenbasis, of both gradients (published: of the first).

An entry of :math:`X = Q_L^\top M_t Q_R` has the sign 0 where rounding may have made it (published: a sign):

.. math::
    |X_{ij}| \le 8 \varepsilon \max\left( \|X_{i \cdot}\|, \|X_{\cdot j}\|, \|X\|_F / (MN)^{1/4} \right)

with the dtype's :math:`\varepsilon`. Such entries lie where no gradient has been: with gradients of rank 4 the
published update of a 64 x 64 matrix is 16 times as long beside their span as in it, and goes where rounding takes it.

The authors evaluate an average of the weights, as `WeightAverage(optimizer, 0.999)` does, and decay by the scaled
rate: their weight decay of 0.01 is 0.02 / (M + N) here.

State for an M x N matrix: MN + 2 M^2 + 2 N^2 numbers, MN fewer than SOAP's.

References:
    Frans, Levine and Abbeel 2025, A Stable Whitening Optimizer for Efficient Neural Network Training, arXiv 2506.07254.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.linalg import vector_norm

from emerging_optimizers.engine import Phase, RuleOptimizer, Scalars, Step, lerp
from emerging_optimizers.engine.options import (
    LearningRate,
    MatrixParams,
    Momentum,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import BasisL_BMM, BasisR_BNN, FactorL_BMM, FactorR_BNN, Momentum_BMN
from emerging_optimizers.linalg.kronecker import project_in, project_out
from emerging_optimizers.soap.options import (
    EigenbasisOptions,
    PowerIterSteps,
    ProductPrecision,
    RefreshPrecision,
    UseEigh,
)
from emerging_optimizers.soap.soap import EigenbasisRule

# Of products with both bases, in units of the dtype's epsilon. With 8 an update beside the span of gradients of low
# rank is at most 0.56 times as long as in it, mostly 0; of full rank, with singular values like 1/i, at most 0.9 % of
# the entries of a 1024 x 1024 matrix are lost.
_ROUNDING = 8


class SPlusState(NamedTuple):
    """Momentum, factors, bases; a side that is not preconditioned has no factor and no basis."""

    momentum_buffer: Momentum_BMN
    L: FactorL_BMM
    R: FactorR_BNN
    Q_L: BasisL_BMM  # columns by falling eigenvalue
    Q_R: BasisR_BNN


@dataclass(frozen=True, kw_only=True)
class SPlusRule(EigenbasisRule):
    """Factors, bases, and the sign of the momentum between them."""

    State = SPlusState
    reads = ("momentum", "shampoo_beta", "step")

    @property
    def whitens_factors(self) -> bool:
        """Shampoo's own factors."""
        return False

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: SPlusState = state
        momentum_BMN = lerp(s.momentum_buffer, grad, 1 - t.momentum)
        signs_BMN = _above_rounding(project_in(momentum_BMN, s.Q_L, s.Q_R)).sign()
        direction_BMN = project_out(signs_BMN, s.Q_L, s.Q_R) * (2 / (grad.size(-2) + grad.size(-1)))
        return Step(direction_BMN, s._replace(momentum_buffer=momentum_BMN))

    def turn(self, s: SPlusState, phase: Phase) -> SPlusState:
        """The momentum is in the parameter's own space, and stays."""
        seen = s.momentum_buffer.abs().amax(dim=(-2, -1), keepdim=True) > 0
        left, right = self.follow(s.L, s.Q_L, seen, phase), self.follow(s.R, s.Q_R, seen, phase)
        return s._replace(Q_L=left.basis, Q_R=right.basis)


def _above_rounding(x_BMN: Tensor) -> Tensor:
    """X without what may be rounding alone; see the module's equations."""
    row_BM1, column_B1N = (vector_norm(x_BMN, dim=dim, keepdim=True) for dim in (-1, -2))
    rms_B11 = vector_norm(row_BM1, dim=-2, keepdim=True) / (x_BMN.size(-2) * x_BMN.size(-1)) ** 0.25
    size_BMN = torch.maximum(torch.maximum(row_BM1, rms_B11), column_B1N)
    return x_BMN.masked_fill(x_BMN.abs() <= _ROUNDING * torch.finfo(x_BMN.dtype).eps * size_BMN, 0)


class SPlus(RuleOptimizer):
    """SPlus; the equations are in this module's docstring.

    Update: 2/(M + N) Q_L sign(Q_Lᵀ m Q_R) Q_Rᵀ, Q the eigenvectors of L and R
    When to use it: bases refreshed rarely, with an average of the weights for evaluation
    When not to use it: without that average: on the demo it ended at 2.050 and SOAP at 1.648

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = SPlus([w], lr=0.4)
        >>> w.grad = torch.ones(4, 4)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000, -0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = SPlusRule
    preset = {"precondition_frequency": 100}

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[
            LearningRate,
            "learning rate, >= 0; the RMS of an update is 2 / (M + N) of it, less where gradients have a low rank.",
        ] = 0.1,
        momentum: Momentum = 0.9,
        shampoo_beta: ShampooBeta = 0.999,
        weight_decay: WeightDecay = 0.0,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: ProductPrecision = "highest",
        use_eigh: UseEigh = True,
        qr_fp32_matmul_prec: RefreshPrecision = "high",
        power_iter_steps: PowerIterSteps = 1,
        **engine: Unpack[EigenbasisOptions],
    ) -> None:
        super().__init__(**given(locals()))
