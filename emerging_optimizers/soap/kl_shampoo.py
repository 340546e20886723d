r"""KL-Shampoo: momentum whitened from both sides by Kronecker factors that are fitted to each other.

.. math::
    L_t &= \beta'_s L_{t-1} + \frac{1 - \beta'_s}{N}\, G_t R_{t-1}^{-1} G_t^\top, \qquad
    R_t = \beta'_s R_{t-1} + \frac{1 - \beta'_s}{M}\, G_t^\top L_{t-1}^{-1} G_t \\
    M_t &= \mu M_{t-1} + (1 - \mu)\, G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta\, L_t^{-1/2} \frac{M_t}{1 - \mu^t} R_t^{-1/2}

for an (M, N) matrix. :math:`R \otimes L` is the covariance of the gradient's entries, as near to it in the
Kullback-Leibler divergence as a Kronecker product comes, so that the whitened gradient has an RMS of about 1 and no
second moment is needed: it is SOAP with KL factors without Adam. Roots and inverses are taken in the eigenbases,
which start, follow and are floored as in `soap.soap`; the first step has the identity as its basis and normalises rows
and columns.

State for an M x N matrix: MN + 2 M^2 + 2 N^2 + M + N numbers, MN fewer than SOAP's with KL. For the hidden matrices of
a network.

References:
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import Phase, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import (
    LearningRate,
    MatrixParams,
    Momentum,
    PositiveEps,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import (
    BasisL_BMM,
    BasisR_BNN,
    FactorL_BMM,
    FactorR_BNN,
    Momentum_BMN,
    ValuesL_BM,
    ValuesR_BN,
)
from emerging_optimizers.linalg.eigenbasis import whiten
from emerging_optimizers.linalg.kronecker import project_out
from emerging_optimizers.soap.options import (
    EigenbasisOptions,
    PowerIterSteps,
    ProductPrecision,
    RefreshPrecision,
    UseEigh,
)
from emerging_optimizers.soap.soap import EigenbasisRule


class KLShampooState(NamedTuple):
    """Momentum, factors, bases; a side that is not preconditioned has no factor and no basis."""

    exp_avg: Momentum_BMN
    L: FactorL_BMM
    R: FactorR_BNN
    Q_L: BasisL_BMM  # columns by falling eigenvalue
    Q_R: BasisR_BNN
    eigvals_L: ValuesL_BM  # diag Q_L^T L Q_L
    eigvals_R: ValuesR_BN


@dataclass(frozen=True, kw_only=True)
class KLShampooRule(EigenbasisRule):
    """Factors, bases, and the momentum between the factors' inverse square roots."""

    State = KLShampooState
    reads = ("momentum", "shampoo_beta", "eps", "step")
    divides_by_eigvals = True

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: KLShampooState = state
        momentum_BMN = lerp(s.exp_avg, grad, 1 - t.momentum)
        unbiased_BMN = momentum_BMN / debias(t.momentum, t.step, grad)
        white_BMN = whiten(unbiased_BMN, s.Q_L, s.Q_R, *self.inverse_roots(s, grad, t))
        return Step(project_out(white_BMN, s.Q_L, s.Q_R), s._replace(exp_avg=momentum_BMN))

    def turn(self, s: KLShampooState, phase: Phase) -> KLShampooState:
        """The momentum is in the parameter's own space, and stays."""
        seen = s.exp_avg.abs().amax(dim=(-2, -1), keepdim=True) > 0
        left, right = self.follow(s.L, s.Q_L, seen, phase), self.follow(s.R, s.Q_R, seen, phase)
        return s._replace(Q_L=left.basis, Q_R=right.basis, eigvals_L=left.eigvals, eigvals_R=right.eigvals)


class KLShampoo(RuleOptimizer):
    """KL-Shampoo; the equations are in this module's docstring.

    Update: L^(−1/2) m̂ R^(−1/2), each factor's gradients whitened by the other
    When to use it: SOAP with KL factors without Adam's second moment
    When not to use it: where memory is short: 31 bytes a weight on the demo, Muon 4.2

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = KLShampoo([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = KLShampooRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate,
        momentum: Momentum = 0.9,
        shampoo_beta: ShampooBeta = 0.95,
        eps: Annotated[PositiveEps, "floor of the eigenvalues, > 0."] = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: ProductPrecision = "highest",
        use_eigh: UseEigh = False,
        qr_fp32_matmul_prec: RefreshPrecision = "high",
        power_iter_steps: PowerIterSteps = 1,
        **engine: Unpack[EigenbasisOptions],
    ) -> None:
        super().__init__(**given(locals()))
