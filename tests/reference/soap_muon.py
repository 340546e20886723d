"""SOAP-Muon: SOAP's update, with its singular values sent through Newton-Schulz's polynomials.

    W <- W - lr s f(U / ||U||_F)        U: the update of ``soap.py``, f and s those of ``muon.py``

KellerJordan/modded-nanogpt, 2026, pull request 278.
"""

from typing import Any

from torch import Tensor

from .muon import orthogonalize, scale_factor, schedule
from .soap import ReferenceSOAP
from .weight_decay import decay_weight


class ReferenceSOAPMuon:
    """SOAP-Muon on one matrix in float64."""

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        *,
        weight_decay: float = 0.01,
        weight_decay_method: str = "decoupled",
        nesterov: bool = True,
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
        **options: Any,
    ) -> None:
        self.lr, self.weight_decay, self.weight_decay_method = lr, weight_decay, weight_decay_method
        self.coefficients = schedule(coefficient_type, num_ns_steps)
        self.scale_mode, self.extra_scale_factor = scale_mode, extra_scale_factor
        penalty = weight_decay if weight_decay_method == "l2" else 0.0
        self.t = 0
        self.soap = ReferenceSOAP(
            1.0, betas, weight_decay=penalty, weight_decay_method="l2", nesterov=nesterov, **options
        )

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W = weight.double()
        self.t += 1
        U = orthogonalize(W - self.soap.step(W, grad), self.coefficients)
        U = U * scale_factor(W.shape[0], W.shape[1], self.scale_mode) * self.extra_scale_factor
        return decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method) - self.lr * U
