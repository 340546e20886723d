r"""SOAP-Muon: SOAP's update, orthogonalized.

.. math::
    W_t = (1 - \eta\lambda) W_{t-1} - \eta \, s \, \mathrm{NS}(U_t)

where :math:`U_t = Q_L \,\mathrm{Adam}(Q_L^\top G_t Q_R)\, Q_R^\top` is the update of `soap.soap`, with Nesterov
momentum by default, and NS is Newton-Schulz's approximation of the polar factor. s depends on the matrix's shape; with
`scale_mode="spectral"` the RMS of the update is 1, as Muon's. The momentum that Muon orthogonalizes is first divided,
in the eigenbasis, by the size that gradients usually have there.

State for an M x N matrix: SOAP's, 2 MN + 2 M^2 + 2 N^2 numbers. For the hidden matrices of a network, where fewer steps
are worth a costlier one.

References:
    KellerJordan/modded-nanogpt 2026, pull request 278. Vyas et al. 2024, SOAP, arXiv 2409.11321.
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack, get_args

from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import EngineOptions, RuleOptimizer, Scalars
from emerging_optimizers.engine.options import COUNT, POSITIVE, one_of
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.coefficients import (
    SCHEDULES,
    NSCoeffT,
    announce_coefficients,
    check_coefficients,
    coefficients,
)
from emerging_optimizers.linalg.newton_schulz import newton_schulz
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.linalg.scaling import MuonScaleT, muon_scale_factor
from emerging_optimizers.soap.soap import SOAP, SOAPRule


@dataclass(frozen=True, kw_only=True)
class SOAPMuonRule(SOAPRule):
    """SOAP with Newton-Schulz at its end."""

    scalars = (*SOAPRule.scalars, "extra_scale_factor")
    coefficient_type: NSCoeffT = "quintic"
    num_ns_steps: int = 5
    scale_mode: MuonScaleT = "spectral"

    def finish(self, update_BMN: Tensor, t: Scalars) -> Tensor:
        """s NS(U)."""
        scale = muon_scale_factor(update_BMN.size(-2), update_BMN.size(-1), self.scale_mode)
        polar_BMN = newton_schulz(update_BMN, coefficients(self.coefficient_type, self.num_ns_steps))
        return polar_BMN * (scale * t.extra_scale_factor)


class SOAPMuon(RuleOptimizer):
    """SOAP-Muon; the equations are in this module's docstring.

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices;
            convolutions are flattened to (out, rest).
        lr: learning rate, >= 0; with the default scale, the RMS of the update.
        betas: decay of Adam's moments, each in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: added to the root of the second moment, and the floor of the eigenvalues with KL; > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        nesterov: Adam with Nesterov momentum.
        fp32_matmul_prec: float32 matmul precision of everything but the refresh: "highest", "high" or "medium".
        use_eigh: take the bases from eigh at every refresh instead of one orthogonal iteration.
        qr_fp32_matmul_prec: float32 matmul precision of the refresh.
        power_iter_steps: orthogonal iterations a refresh, >= 1.
        use_kl_shampoo: the factors of KL-Shampoo.
        precondition_frequency: steps from one refresh of the bases to the next, >= 1.
        refresh_ramp: with `precondition_frequency` above 1, the steps after the first basis in which it is refreshed in
            each, before that thins out to the frequency, >= 0; half of the learning rate's warm-up is a good choice.
        max_precond_dim: a side that is longer keeps the identity as its basis and has no factor. None: no limit.
        relative_floor: with KL, eigenvalues below this share of their mean count as it, in [0, 1). None: 0.01.
        overlap: refresh the bases at the end of a step instead of in it: on CUDA on a stream of its own, beside the
            model. An update is then taken in bases that have not seen its gradient, which may cost loss
            (docs/performance.md).
        coefficient_type: the coefficients of Newton-Schulz, as for `Muon`; not "custom".
        num_ns_steps: Newton-Schulz steps, >= 1.
        scale_mode: "spectral" sqrt(max(M, N)); "shape_scaling" sqrt(max(1, M / N)); "unit_rms_norm" sqrt(M / N).
        extra_scale_factor: multiplies the update, > 0.
        **engine: see `EngineOptions`.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = SOAPMuon([w], lr=0.1)
        >>> w.grad = torch.randn(4, 2)
        >>> optimizer.step()
        >>> round(w.square().mean().sqrt().item(), 1)
        0.1
    """

    rule = SOAPMuonRule
    ranges = {
        **SOAP.ranges,
        "correct_bias": one_of(True),
        "correct_shampoo_beta_bias": one_of(None),
        "first_step": one_of("adam"),
        "max_update_rms": one_of(0.0),  # Newton-Schulz sets the RMS
        "coefficient_type": one_of(*SCHEDULES),
        "num_ns_steps": COUNT,
        "scale_mode": one_of(*get_args(MuonScaleT)),
        "extra_scale_factor": POSITIVE,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: WeightDecayT = "decoupled",
        nesterov: bool = True,
        fp32_matmul_prec: FP32MatmulPrecT = "highest",
        use_eigh: bool = False,
        qr_fp32_matmul_prec: FP32MatmulPrecT = "high",
        power_iter_steps: int = 1,
        use_kl_shampoo: bool = False,
        precondition_frequency: int = 1,
        refresh_ramp: int = 0,
        max_precond_dim: int | None = 10000,
        relative_floor: float | None = None,
        overlap: bool = False,
        coefficient_type: NSCoeffT = "quintic",
        num_ns_steps: int = 5,
        scale_mode: MuonScaleT = "spectral",
        extra_scale_factor: float = 1.0,
        **engine: Unpack[EngineOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "nesterov": nesterov,
            "fp32_matmul_prec": fp32_matmul_prec,
            "use_eigh": use_eigh,
            "qr_fp32_matmul_prec": qr_fp32_matmul_prec,
            "power_iter_steps": power_iter_steps,
            "use_kl_shampoo": use_kl_shampoo,
            "precondition_frequency": precondition_frequency,
            "refresh_ramp": refresh_ramp,
            "max_precond_dim": max_precond_dim,
            "relative_floor": relative_floor,
            "overlap": overlap,
            "coefficient_type": coefficient_type,
            "num_ns_steps": num_ns_steps,
            "scale_mode": scale_mode,
            "extra_scale_factor": extra_scale_factor,
            # of SOAP's rule, and fixed here
            "correct_bias": True,
            "correct_shampoo_beta_bias": None,
            "first_step": "adam",
            "max_update_rms": 0.0,
        }
        super().__init__(params, defaults, **engine)

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        check_coefficients(group["coefficient_type"], group["num_ns_steps"], group["fp32_matmul_prec"])

    @classmethod
    def _announce(cls, group: Mapping[str, Any]) -> None:
        announce_coefficients(group["coefficient_type"], group["num_ns_steps"])
