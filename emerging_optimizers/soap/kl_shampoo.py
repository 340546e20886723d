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
from typing import Any, NamedTuple, Unpack, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import EngineOptions, Phase, RuleOptimizer, Scalars, Step, debias, lerp
from emerging_optimizers.engine.options import COUNT, FLAG, FRACTION, POSITIVE, WHOLE, one_of, optional
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.kronecker import project_in, project_out
from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision
from emerging_optimizers.soap.soap import EigenbasisRule


class KLShampooState(NamedTuple):
    """Momentum, factors, bases; a side that is not preconditioned has no factor and no basis."""

    exp_avg: Tensor  # B M N
    L: Tensor | None  # B M M
    R: Tensor | None  # B N N
    Q_L: Tensor | None  # B M M, columns by falling eigenvalue
    Q_R: Tensor | None  # B N N
    eigvals_L: Tensor | None  # B M, diag Q_L^T L Q_L
    eigvals_R: Tensor | None  # B N


@dataclass(frozen=True, kw_only=True)
class KLShampooRule(EigenbasisRule):
    """Factors, bases, and the momentum between the factors' inverse square roots."""

    scalars = ("momentum", "shampoo_beta", "eps")
    divides_by_eigvals = True

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> KLShampooState:
        """Zero momentum and factors, identity bases."""
        return KLShampooState(torch.zeros(shape, dtype=dtype, device=device), *self.start_factors(shape, dtype, device))

    def update(self, grad: Tensor, state: Any, t: Scalars, phase: Phase) -> Step:
        """See the module's equations."""
        s: KLShampooState = self.take_in(grad, state, t, phase)
        momentum_BMN = lerp(s.exp_avg, grad, 1 - t.momentum)
        update_BMN = project_in(momentum_BMN / debias(t.momentum, t.step, grad), s.Q_L, s.Q_R)
        if s.eigvals_L is not None:
            update_BMN = update_BMN * self.floored(s.eigvals_L, grad, t).rsqrt().unsqueeze(-1)
        if s.eigvals_R is not None:
            update_BMN = update_BMN * self.floored(s.eigvals_R, grad, t).rsqrt().unsqueeze(-2)
        return Step(project_out(update_BMN, s.Q_L, s.Q_R), s._replace(exp_avg=momentum_BMN))

    def refresh(self, s: KLShampooState, phase: Phase) -> KLShampooState:
        """Bases that follow the factors; the momentum is in the parameter's own space."""
        with fp32_matmul_precision(self.qr_fp32_matmul_prec):
            seen = s.exp_avg.abs().amax(dim=(-2, -1), keepdim=True) > 0
            left, right = self.follow(s.L, s.Q_L, seen, phase), self.follow(s.R, s.Q_R, seen, phase)
        return s._replace(Q_L=left.basis, Q_R=right.basis, eigvals_L=left.eigvals, eigvals_R=right.eigvals)


class KLShampoo(RuleOptimizer):
    """KL-Shampoo; the equations are in this module's docstring.

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices;
            convolutions are flattened to (out, rest).
        lr: learning rate, >= 0.
        momentum: mu, in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: floor of the eigenvalues, > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        fp32_matmul_prec: float32 matmul precision of factors and projections: "highest", "high" or "medium".
        use_eigh: take the bases from eigh at every refresh instead of orthogonal iteration.
        qr_fp32_matmul_prec: float32 matmul precision of the refresh; what eigenvalues are made of is "highest".
        power_iter_steps: orthogonal iterations a refresh, >= 1.
        precondition_frequency: steps from one refresh of the bases to the next, >= 1.
        refresh_ramp: with `precondition_frequency` above 1, the steps after the first basis in which it is refreshed in
            each, before that thins out to the frequency, >= 0; half of the learning rate's warm-up is a good choice.
        max_precond_dim: a side that is longer has no factor; both longer: SGD with momentum. None: no limit.
        relative_floor: eigenvalues below this share of their mean count as it, in [0, 1). None: 0.01.
        overlap: refresh the bases at the end of a step instead of in it: on CUDA on a stream of its own, beside the
            model. An update is then taken in bases that have not seen its gradient, which may cost loss
            (docs/performance.md).
        **engine: see `EngineOptions`.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = KLShampoo([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = KLShampooRule
    ranges = {
        "momentum": FRACTION,
        "shampoo_beta": FRACTION,
        "eps": POSITIVE,
        "fp32_matmul_prec": one_of(*get_args(FP32MatmulPrecT)),
        "use_eigh": FLAG,
        "qr_fp32_matmul_prec": one_of(*get_args(FP32MatmulPrecT)),
        "power_iter_steps": COUNT,
        "precondition_frequency": COUNT,
        "refresh_ramp": WHOLE,
        "max_precond_dim": optional(COUNT),
        "relative_floor": optional(FRACTION),
        "overlap": FLAG,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: WeightDecayT = "decoupled",
        fp32_matmul_prec: FP32MatmulPrecT = "highest",
        use_eigh: bool = False,
        qr_fp32_matmul_prec: FP32MatmulPrecT = "high",
        power_iter_steps: int = 1,
        precondition_frequency: int = 1,
        refresh_ramp: int = 0,
        max_precond_dim: int | None = 10000,
        relative_floor: float | None = None,
        overlap: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "fp32_matmul_prec": fp32_matmul_prec,
            "use_eigh": use_eigh,
            "qr_fp32_matmul_prec": qr_fp32_matmul_prec,
            "power_iter_steps": power_iter_steps,
            "precondition_frequency": precondition_frequency,
            "refresh_ramp": refresh_ramp,
            "max_precond_dim": max_precond_dim,
            "relative_floor": relative_floor,
            "overlap": overlap,
        }
        super().__init__(params, defaults, **engine)
