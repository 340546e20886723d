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
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine.hooks import HyperballHook
from emerging_optimizers.engine.options import POSITIVE, optional
from emerging_optimizers.engine.validate import label
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.coefficients import NSCoeffT
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.linalg.scaling import MuonScaleT
from emerging_optimizers.orthogonalized_optimizers.muon import Muon, MuonRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import OrthogonalizerOptions


@dataclass(frozen=True, kw_only=True)
class MuonHyperballRule(MuonRule):
    """Muon, and the sphere."""

    derived = ("hyperball_R",)  # June 2026 keeps the norm of the last step
    hyperball_eps: float = 1e-8
    hyperball_radius: float | None = None

    @property
    def hook(self) -> HyperballHook:
        """The projection."""
        return HyperballHook(self.hyperball_radius, self.hyperball_eps)


class MuonHyperball(Muon):
    """MuonHyperball; the equations are in this module's docstring.

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices;
            convolutions are flattened to (out, rest).
        lr: learning rate, >= 0; the angle of a step.
        momentum: mu, in [0, 1).
        weight_decay: >= 0.
        hyperball_eps: smaller norms count as zero, > 0.
        hyperball_radius: R, > 0, for every matrix, which the first step takes there; None: the norm that each has.
        nesterov: look one step ahead.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        fp32_matmul_prec: as in `Muon`.
        coefficient_type: as in `Muon`.
        num_ns_steps: Newton-Schulz steps, >= 1.
        scale_mode: as in `Muon`; without effect, as the update is normalized.
        extra_scale_factor: as in `Muon`; without effect, as the update is normalized.
        use_syrk: as in `Muon`.
        **options: see `OrthogonalizerOptions`; `weight_update_hook` has to be None.

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
    ranges = {**Muon.ranges, "hyperball_eps": POSITIVE, "hyperball_radius": optional(POSITIVE)}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        hyperball_eps: float = 1e-8,
        hyperball_radius: float | None = None,
        nesterov: bool = False,
        weight_decay_method: WeightDecayT = "decoupled",
        fp32_matmul_prec: FP32MatmulPrecT = "medium",
        coefficient_type: NSCoeffT = "quintic",
        num_ns_steps: int = 5,
        scale_mode: MuonScaleT = "spectral",
        extra_scale_factor: float = 1.0,
        use_syrk: bool = False,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        own: Any = {"hyperball_eps": hyperball_eps, "hyperball_radius": hyperball_radius}
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            nesterov=nesterov,
            weight_decay_method=weight_decay_method,
            fp32_matmul_prec=fp32_matmul_prec,
            coefficient_type=coefficient_type,
            num_ns_steps=num_ns_steps,
            scale_mode=scale_mode,
            extra_scale_factor=extra_scale_factor,
            use_syrk=use_syrk,
            **options,
            **own,
        )

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
            if p.requires_grad and p.numel() and float(p.detach().norm()) < group["hyperball_eps"]:
                raise ValueError(
                    f"MuonHyperball: {label(group, i, p)} is zero and would stay so, as hyperball_radius=None keeps "
                    "the norm that a weight has; give hyperball_radius, or initialize the weight"
                )
