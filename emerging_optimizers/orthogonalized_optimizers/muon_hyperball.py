r"""MuonHyperball: Muon on a sphere.

.. math::
    Y_t &= (1 - \eta\lambda) W_{t-1} - \eta \, R \, U_t / \|U_t\|_F \\
    W_t &= R \, Y_t / \|Y_t\|_F

U is Muon's update and R the radius: a number, or the norm that each matrix has. Only the direction of a weight is
learned, and the learning rate is the angle of a step (nearly, and in radians); weight decay turns the weight a little
further towards the update and is of no other use.

The same law for any optimizer is `weight_update_hook="hyperball"`. State: one tensor, 4 bytes a parameter.

References:
    Wen et al. 2026, Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization,
        arXiv 2606.16899.
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Unpack

from emerging_optimizers.distributed.dtensor import norm_of
from emerging_optimizers.engine.hooks import HyperballHook
from emerging_optimizers.engine.options import (
    POSITIVE,
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
    optional,
)
from emerging_optimizers.engine.rule import TranslatesState
from emerging_optimizers.engine.validate import label
from emerging_optimizers.orthogonalized_optimizers.muon import Muon, MuonRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    UseSyrk,
)


@dataclass(frozen=True, kw_only=True)
class MuonHyperballRule(MuonRule, TranslatesState):
    """Muon, and the sphere."""

    hyperball_eps: float = 1e-8
    hyperball_radius: float | None = None

    def translate(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """June 2026 keeps the norm of the last step."""
        return {key: value for key, value in saved.items() if key != "hyperball_R"}

    @property
    def weight_law(self) -> HyperballHook:
        """The projection."""
        return HyperballHook(self.hyperball_radius, self.hyperball_eps)


HyperballRadius = Annotated[
    float | None,
    Option(
        optional(POSITIVE), "R, > 0, for every matrix, which the first step takes there; None: the norm that each has."
    ),
]


class MuonHyperball(Muon):
    """MuonHyperball; the equations are in this module's docstring.

    Update: s O, on a sphere of constant ‖W‖
    When to use it: the learning rate is an angle; no weight decay to tune
    When not to use it: weights that start at zero: they have no sphere

    Raises:
        ValueError: a value out of its range, a parameter with fewer than two dimensions, or one that is zero where
            `hyperball_radius` is None.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.full((2, 2), 1.5))
        >>> optimizer = MuonHyperball([w], lr=0.1)
        >>> w.grad = torch.randn(2, 2)
        >>> optimizer.step()
        >>> round(w.norm().item(), 4)
        3.0
    """

    rule = MuonHyperballRule

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; the angle of a step."] = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        hyperball_eps: Annotated[float, Option(POSITIVE, "smaller norms count as zero, > 0.")] = 1e-8,
        hyperball_radius: HyperballRadius = None,
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

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        super()._check_choice(group)
        HyperballHook(group["hyperball_radius"], group["hyperball_eps"])

    @classmethod
    def _announce(cls, group: Mapping[str, Any]) -> None:
        super()._announce(group)
        if group["hyperball_radius"] is not None:
            return
        for i, p in enumerate(group["params"]):
            if p.requires_grad and p.numel() and norm_of(p) < group["hyperball_eps"]:
                raise ValueError(
                    f"MuonHyperball: {label(group, i, p)} is zero and would stay so, as hyperball_radius=None keeps "
                    "the norm that a weight has; give hyperball_radius, or initialize the weight"
                )
