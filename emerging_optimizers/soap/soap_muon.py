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
from typing import Annotated, Any, Unpack

from torch import Tensor

from emerging_optimizers.engine import RuleOptimizer, Scalars
from emerging_optimizers.engine.options import (
    Betas,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Nesterov,
    NewtonSchulzSteps,
    ScaleMode,
    ScheduledCoefficients,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.linalg.coefficients import (
    NSCoeffT,
    announce_coefficients,
    check_coefficients,
    coefficients,
)
from emerging_optimizers.linalg.newton_schulz import newton_schulz
from emerging_optimizers.linalg.scaling import MuonScaleT, muon_scale_factor
from emerging_optimizers.soap.options import (
    EigenbasisOptions,
    FactorEps,
    PowerIterSteps,
    ProductPrecision,
    RefreshPrecision,
    UseEigh,
    UseKLShampoo,
)
from emerging_optimizers.soap.soap import SOAPRule


@dataclass(frozen=True, kw_only=True)
class SOAPMuonRule(SOAPRule):
    """SOAP with Newton-Schulz at its end."""

    reads = (*SOAPRule.reads, "extra_scale_factor")
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

    Update: s NS(U), U the update of SOAP
    When to use it: fewest steps to a loss in modded-nanogpt's benchmark; step cost of SOAP and Muon together
    When not to use it: where SOAP's cost is too high: it has that of Muon on top

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
    # Newton-Schulz sets the RMS.
    fixed = {"correct_bias": True, "correct_shampoo_beta_bias": None, "first_step": "adam", "max_update_rms": 0.0}

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; with the default scale, the RMS of the update."],
        betas: Betas = (0.95, 0.95),
        shampoo_beta: ShampooBeta = 0.95,
        eps: FactorEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        nesterov: Annotated[Nesterov, "Adam with Nesterov momentum."] = True,
        fp32_matmul_prec: ProductPrecision = "highest",
        use_eigh: UseEigh = False,
        qr_fp32_matmul_prec: RefreshPrecision = "high",
        power_iter_steps: PowerIterSteps = 1,
        use_kl_shampoo: UseKLShampoo = False,
        coefficient_type: ScheduledCoefficients = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: ScaleMode = "spectral",
        extra_scale_factor: ExtraScaleFactor = 1.0,
        **engine: Unpack[EigenbasisOptions],
    ) -> None:
        super().__init__(**given(locals()))

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        check_coefficients(group["coefficient_type"], group["num_ns_steps"], group["fp32_matmul_prec"])

    @classmethod
    def _announce(cls, group: Mapping[str, Any]) -> None:
        announce_coefficients(group["coefficient_type"], group["num_ns_steps"])
