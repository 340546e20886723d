r"""MuonMix: Muon whose momentum is a mixture of a fast and a slow average.

.. math::
    F_t &= \mu F_{t-1} + (1 - \mu) G_t, \qquad S_t = \mu_s S_{t-1} + (1 - \mu_s) G_t \\
    M_t &= (1 - w) F_t + w S_t \\
    O_t &= \mathrm{NS}(N_t), \qquad
    W_t = (1 - \eta\lambda) W_{t-1} - \eta \, s \, O_t

:math:`N_t` is the mixture or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`; s is Muon's scale. One average has one
memory: the mixture listens to the newest gradients and to those that the fast one has long forgotten, as AdEMAMix does.
The slow average starts at zero and is not corrected, so it grows into the update over about 1 / (1 - mu_s) steps, in
which MuonMix is Muon nearly. (modded-nanogpt keeps one average for 1,000 steps and then starts both from it.)

For long runs. State: two tensors, 8 bytes a parameter.

References:
    KellerJordan/modded-nanogpt 2026, pull requests 339 and 340 (bi-Maxwell momentum).
    Pagliardini, Ablin and Grangier 2024, The AdEMAMix Optimizer: Better, Faster, Older, arXiv 2409.03137.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import Scalars, Step, lerp
from emerging_optimizers.engine.options import (
    FRACTION,
    SHARE,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    Option,
    ScaleMode,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Momentum_BMN, Part
from emerging_optimizers.orthogonalized_optimizers.muon import MuonRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    UseSyrk,
)


class MuonMixState(NamedTuple):
    """The fast average and the slow one."""

    momentum_buffer: Momentum_BMN
    slow_buffer: Annotated[Tensor, Part("B M N", rounds=True)]


@dataclass(frozen=True, kw_only=True)
class MuonMixRule(MuonRule):
    """The polar factor of a mixture of two momenta."""

    State = MuonMixState
    reads = ("momentum", "slow_momentum", "slow_share", "extra_scale_factor")

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        fast_BMN = lerp(state.momentum_buffer, grad, 1 - t.momentum)
        slow_BMN = lerp(state.slow_buffer, grad, 1 - t.slow_momentum)
        mixed_BMN = lerp(fast_BMN, slow_BMN, t.slow_share)
        ahead_BMN = lerp(grad, mixed_BMN, t.momentum) if self.nesterov else mixed_BMN
        return Step(self.orthogonalize(ahead_BMN, t), MuonMixState(fast_BMN, slow_BMN))

    def orthogonalize(self, x_BMN: Tensor, t: Any) -> Tensor:
        """s O."""
        return self.polar(x_BMN).mul_(self.scale(x_BMN.shape, t))  # fresh, so in place


class MuonMix(PolarOptimizer):
    """MuonMix; the equations are in this module's docstring.

    Update: s O, O of (1 − w) m + w m_slow
    When to use it: long runs with Muon
    When not to use it: short runs: on the demo it ended at 1.745 and Muon at 1.739, with half the state

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = MuonMix([w], lr=0.1, slow_momentum=0.98, slow_share=0.5, fp32_matmul_prec="highest")
        >>> w.grad = torch.randn(4, 2)
        >>> optimizer.step()
        >>> round(w.square().mean().sqrt().item(), 1)
        0.1
    """

    rule = MuonMixRule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 3e-3,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        slow_momentum: Annotated[float, Option(FRACTION, "decay of the slow average, in [0, 1).")] = 0.985,
        slow_share: Annotated[float, Option(SHARE, "weight of the slow average, in [0, 1]; 0: Muon.")] = 0.5,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: ScaleMode = "spectral",
        extra_scale_factor: ExtraScaleFactor = 1.0,
        use_syrk: UseSyrk = False,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))
