r"""PolarGrad: the polar factor of the momentum, scaled by its nuclear norm.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    O_t &= \mathrm{NS}(N_t) \approx U V^\top \quad\text{for}\quad N_t = U \Sigma V^\top \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, \langle O_t, N_t \rangle \, O_t

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`, and
:math:`\langle O_t, N_t \rangle \approx \operatorname{tr} \Sigma` its nuclear norm. This is steepest descent in the
spectral norm: unlike Muon's, the update shrinks with the gradient, so a constant learning rate converges, and learning
rates depend on the scale of the loss.

State: one tensor, 4 bytes a parameter.

References:
    Lau et al. 2025, PolarGrad: A Class of Matrix-Gradient Optimizers from a Unifying Preconditioning Perspective,
    arXiv 2505.21799.
"""

from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.options import (
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumState, average
from emerging_optimizers.orthogonalized_optimizers.mop import nuclear_norm
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    PolarRule,
)


@dataclass(frozen=True, kw_only=True)
class PolarGradRule(PolarRule):
    """The polar factor of the momentum, scaled by the nuclear norm."""

    reads = ("momentum", "extra_scale_factor")

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        polar_BMN = self.polar(ahead_BMN)
        scale_B11 = nuclear_norm(polar_BMN, ahead_BMN) * t.extra_scale_factor
        return Step(polar_BMN * scale_B11, MomentumState(momentum_BMN))


class PolarGrad(PolarOptimizer):
    """PolarGrad; the equations are in this module's docstring.

    Update: ⟨O, m⟩ O
    When to use it: updates that shrink with the gradient; the rate depends on the loss's scale
    When not to use it: with a rate of AdamW or Muon: an update is as large as the gradient's nuclear norm makes it

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = PolarGrad([w], lr=0.1, momentum=0.0, orthogonalizer="svd")
        >>> w.grad = torch.diag(torch.tensor([3.0, -1.0]))
        >>> optimizer.step()
        >>> w.detach().diagonal()
        tensor([-0.4000,  0.4000])
    """

    rule = PolarGradRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "highest",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        extra_scale_factor: ExtraScaleFactor = 1.0,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))


def one_sided_polargrad_orth_fn(
    grad: Tensor,
    *,
    side: Literal["left", "right"],
    alpha: float = 1.0,
    center_rows: bool = False,
    eps: float = 1e-15,
    extra_scale_factor: float = 1.0,
) -> Tensor:
    r"""The polar factor through the Gram matrix of one side, for `scaled_orthogonalize_fn`.

    .. math::
        U_{left} = (G G^\top)^{-1/2} G, \qquad U_{right} = G (G^\top G)^{-1/2}

    times :math:`\|G\|_*^\alpha`. "right" is cheap for tall matrices (embeddings, heads), "left" for wide ones
    (routers). Directions whose eigenvalue is rounding noise are left out.

    Args:
        grad: (M, N) or (B, M, N).
        side: "left" or "right".
        alpha: exponent of the nuclear norm; 0: a plain polar factor.
        center_rows: take the mean row off before and after.
        eps: lower bound of the Gram matrix's eigenvalues.
        extra_scale_factor: multiplies the result.

    Returns:
        A tensor like `grad`, computed in float32 or wider.

    Raises:
        ValueError: another side.

    Example:
        >>> one_sided_polargrad_orth_fn(torch.diag(torch.tensor([3.0, -1.0])), side="left").diagonal()
        tensor([ 4., -4.])
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is not one of 'left', 'right'")
    if grad.ndim < 2:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; give a matrix (M, N) or a stack of them")
    x = grad.double() if grad.dtype == torch.float64 else grad.float()
    if center_rows:
        x = x - x.mean(dim=-2, keepdim=True)
    gram = x @ x.mT if side == "left" else x.mT @ x
    values, vectors = eigh_descending(gram.reshape(-1, *gram.shape[-2:]))
    values = values.clamp_min(eps)
    limit = values[:, :1] * (gram.size(-1) * torch.finfo(x.dtype).eps)
    inverse_root = (vectors * torch.where(values > limit, values.rsqrt(), 0).unsqueeze(-2)) @ vectors.mT
    inverse_root = inverse_root.view(gram.shape)
    scale = values.sqrt().sum(-1).view(*gram.shape[:-2], 1, 1) ** alpha * extra_scale_factor
    x = (inverse_root @ x if side == "left" else x @ inverse_root) * scale
    if center_rows:
        x = x - x.mean(dim=-2, keepdim=True)
    return x.to(grad.dtype)


def left_polargrad_orth_fn(
    grad: Tensor,
    *,
    alpha: float = 1.0,
    center_rows: bool = False,
    eps: float = 1e-15,
    extra_scale_factor: float = 1.0,
) -> Tensor:
    """`one_sided_polargrad_orth_fn` with side="left", for wide matrices."""
    return one_sided_polargrad_orth_fn(
        grad, side="left", alpha=alpha, center_rows=center_rows, eps=eps, extra_scale_factor=extra_scale_factor
    )


def right_polargrad_orth_fn(
    grad: Tensor,
    *,
    alpha: float = 1.0,
    center_rows: bool = False,
    eps: float = 1e-15,
    extra_scale_factor: float = 1.0,
) -> Tensor:
    """`one_sided_polargrad_orth_fn` with side="right", for tall matrices."""
    return one_sided_polargrad_orth_fn(
        grad, side="right", alpha=alpha, center_rows=center_rows, eps=eps, extra_scale_factor=extra_scale_factor
    )
