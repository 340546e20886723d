r"""Muon: MomentUm Orthogonalized by Newton-Schulz.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    O_t &= \mathrm{NS}(N_t) \approx U V^\top \quad\text{for}\quad N_t = U \Sigma V^\top \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, s \, O_t

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) G_t + \mu M_t`; s depends on the matrix's shape. With
`scale_mode="spectral"` (s = sqrt(max(M, N))) the update's RMS is 1: use `extra_scale_factor=0.2` to train with
AdamW's learning rates and weight decay.

For the hidden matrices of a network; embeddings, heads and vectors belong to AdamW (`create_optimizer("muon",
model)` does that). State: one tensor, 4 bytes a parameter.

References:
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
    Liu et al. 2025, Muon is Scalable for LLM Training, arXiv 2502.16982.
"""

from dataclasses import dataclass
from typing import ClassVar, Unpack, get_args

from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import Scalars
from emerging_optimizers.engine.options import POSITIVE, one_of
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.coefficients import NSCoeffT
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.linalg.scaling import MuonScaleT
from emerging_optimizers.linalg.scaling import muon_scale_factor as get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    OrthogonalizerOptions,
    PolarOptimizer,
    PolarRule,
)


@dataclass(frozen=True, kw_only=True)
class MuonRule(PolarRule):
    """The polar factor of the momentum, scaled by the matrix's shape."""

    scalars: ClassVar[tuple[str, ...]] = ("momentum", "extra_scale_factor")
    scale_mode: MuonScaleT = "spectral"

    def orthogonalize(self, x_BMN: Tensor, t: Scalars) -> Tensor:
        """s NS(X)."""
        scale = get_muon_scale_factor(x_BMN.size(-2), x_BMN.size(-1), self.scale_mode)
        return self.polar(x_BMN).mul_(scale * t.extra_scale_factor)  # fresh, so in place


class Muon(PolarOptimizer):
    """Muon; the equations are in this module's docstring.

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices;
            convolutions are flattened to (out, rest).
        lr: learning rate, >= 0; with the default scale, the RMS of the update.
        momentum: mu, in [0, 1).
        weight_decay: >= 0.
        nesterov: look one step ahead.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        fp32_matmul_prec: Newton-Schulz in bfloat16 where the device multiplies it fast, else float32 ("medium";
            `repr` says which, `linalg.precision` how that is decided), TF32 where the device has it ("high") or float32
            ("highest"). float64 parameters are computed in float64.
        coefficient_type: "quintic" (5 steps), "simple" (any), "polar_express" (8), "cans" (5), "aol" (4),
            "deepseekv4" (10), "cubic5" (5) or "custom". Another number of steps than a set is made for is
            announced by a warning; "cubic5" refuses it. "cans" diverges on gradients of low rank where products are
            rounded, and is refused unless `fp32_matmul_prec="highest"`. "aol" follows nearly rank-one gradients with
            the wrong sign, as published, and a warning says so.
        num_ns_steps: Newton-Schulz steps, >= 1.
        scale_mode: "spectral" sqrt(max(M, N)); "shape_scaling" sqrt(max(1, M / N)); "unit_rms_norm" sqrt(M / N).
        extra_scale_factor: multiplies the update, > 0. 0.2 matches the update RMS of AdamW.
        use_syrk: the symmetric products of Newton-Schulz by a triton kernel that computes half of them: on CUDA
            devices with triton, for bfloat16 and float32 (not float64); elsewhere True is refused. At
            fp32_matmul_prec="highest" the kernel does without tensor cores, and is right rather than fast.
        **options: see `OrthogonalizerOptions`.

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
    ranges = {
        **PolarOptimizer.ranges,
        "scale_mode": one_of(*get_args(MuonScaleT)),
        "extra_scale_factor": POSITIVE,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
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
        )
