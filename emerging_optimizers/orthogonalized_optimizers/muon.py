r"""Muon: MomentUm Orthogonalized by Newton-Schulz.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    O_t &= \mathrm{NS}(N_t) \approx U V^\top \quad\text{for}\quad N_t = U \Sigma V^\top \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, s \, O_t

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`; s depends on the matrix's shape. With
`scale_mode="spectral"` (s = sqrt(max(M, N))) the update's RMS is 1, and AdamW's is 0.1 to 0.4. To train with AdamW's
learning rates and weight decay, say `create_optimizer("muon", model, match="adamw")`, which multiplies the rate by what
was best on three tasks; `extra_scale_factor=0.2` makes updates about as long as AdamW's.

For the hidden matrices of a network; embeddings, heads and vectors belong to AdamW (`create_optimizer("muon",
model)` does that). State: one tensor, 4 bytes a parameter.

References:
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
    Liu et al. 2025, Muon is Scalable for LLM Training, arXiv 2502.16982.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

from torch import Tensor

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.options import (
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    ScaleMode,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.linalg.scaling import MuonScaleT
from emerging_optimizers.linalg.scaling import muon_scale_factor as get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumState, average
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    PolarRule,
    UseSyrk,
)

__all__ = ["Muon", "MuonRule", "MuonScaleT", "get_muon_scale_factor"]  # the last two for type checkers


@dataclass(frozen=True, kw_only=True)
class MuonRule(PolarRule):
    """The polar factor of the momentum, scaled by the matrix's shape."""

    reads: ClassVar[tuple[str, ...]] = ("momentum", "extra_scale_factor")
    scale_mode: MuonScaleT = "spectral"

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        polar_BMN = self.polar(ahead_BMN)
        return Step(polar_BMN.mul_(self.scale(grad.shape, t)), MomentumState(momentum_BMN))  # fresh, so in place

    def scale(self, shape: Sequence[int], t: Any) -> Any:
        """s, for the shape of the whole matrix."""
        return get_muon_scale_factor(shape[-2], shape[-1], self.scale_mode) * t.extra_scale_factor


MuonExtraScaleFactor = Annotated[ExtraScaleFactor, "multiplies the update, > 0. 0.2 is about the update RMS of AdamW."]


class Muon(PolarOptimizer):
    """Muon; the equations are in this module's docstring.

    Update: s O
    When to use it: the first choice for hidden matrices
    When not to use it: embeddings and heads; adapters of a language model, where AdamW was 0.02
        better

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = Muon([w], lr=0.1, fp32_matmul_prec="highest")
        >>> w.grad = torch.randn(4, 2)
        >>> optimizer.step()
        >>> round(w.square().mean().sqrt().item(), 1)
        0.1
    """

    rule = MuonRule

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; with the default scale, the RMS of the update."] = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: ScaleMode = "spectral",
        extra_scale_factor: MuonExtraScaleFactor = 1.0,
        use_syrk: UseSyrk = False,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))
