"""A second opinion on every optimizer: one matrix, float64, written slowly from the paper.

A reference takes the library's hyper-parameters by name, with the library's defaults, and has one method:
``step(weight, grad)`` returns the new weight. Its state stands in attributes that are named like the
optimizer's checkpoint keys; ``t`` is the number of steps taken (the checkpoint's ``step``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .adamw import ReferenceAdamW
from .ademamix import ReferenceAdEMAMix, ReferenceSimplifiedAdEMAMix
from .iso import ReferenceIso
from .kl_shampoo import ReferenceKLShampoo
from .laprop import ReferenceLaProp
from .lion import ReferenceLion
from .madam import ReferenceMAdam, ReferenceRMSProp
from .moso import ReferenceMOSO
from .muon import ReferenceMuon
from .oblique import ReferenceObliqueAdam, ReferenceObliqueSGD
from .orthogonalized import (
    ReferenceAdaptiveMuon,
    ReferenceMOP,
    ReferenceMuonHyperball,
    ReferenceMuown,
    ReferencePolarGrad,
    ReferenceScion,
    ReferenceSpel,
)
from .psgd import ReferencePSGDPro
from .rekls import ReferenceKlMSoap, ReferenceKlSoap, ReferenceREKLS
from .shampoo import ReferenceShampoo
from .signum import ReferenceSignum
from .soap import ReferenceSOAP
from .soap_muon import ReferenceSOAPMuon
from .spectron import ReferenceSpectron


class Reference(Protocol):
    """What every reference offers."""

    t: int

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        ...


REFERENCES: dict[str, Callable[..., Reference]] = {
    "adamw": ReferenceAdamW,
    "ademamix": ReferenceAdEMAMix,
    "iso": ReferenceIso,
    "kl_m_soap": ReferenceKlMSoap,
    "kl_shampoo": ReferenceKLShampoo,
    "kl_soap": ReferenceKlSoap,
    "laprop": ReferenceLaProp,
    "lion": ReferenceLion,
    "madam": ReferenceMAdam,
    "moso": ReferenceMOSO,
    "muon": ReferenceMuon,
    "adaptive_muon": ReferenceAdaptiveMuon,
    "mop": ReferenceMOP,
    "muon_hyperball": ReferenceMuonHyperball,
    "muown": ReferenceMuown,
    "polargrad": ReferencePolarGrad,
    "scion": ReferenceScion,
    "spel": ReferenceSpel,
    "oblique_adam": ReferenceObliqueAdam,
    "oblique_sgd": ReferenceObliqueSGD,
    "psgd_pro": ReferencePSGDPro,
    "rekls": ReferenceREKLS,
    "rekls_v3": ReferenceREKLS,
    "rmsprop": ReferenceRMSProp,
    "shampoo": ReferenceShampoo,
    "signum": ReferenceSignum,
    "sim_ademamix": ReferenceSimplifiedAdEMAMix,
    "soap": ReferenceSOAP,
    "tp_rekls": ReferenceREKLS,
    "soap_muon": ReferenceSOAPMuon,
    "spectron": ReferenceSpectron,
    "stacked_soap": partial(ReferenceSOAP, use_kl_shampoo=True),  # of a 2-D parameter
}


def make_reference(name: str, **hyperparameters: Any) -> Reference:
    """The reference of the optimizer ``name``."""
    return REFERENCES[name](**hyperparameters)


__all__ = [
    "REFERENCES",
    "Reference",
    "ReferenceAdEMAMix",
    "ReferenceAdamW",
    "ReferenceAdaptiveMuon",
    "ReferenceIso",
    "ReferenceKLShampoo",
    "ReferenceKlMSoap",
    "ReferenceKlSoap",
    "ReferenceLaProp",
    "ReferenceLion",
    "ReferenceMAdam",
    "ReferenceMOP",
    "ReferenceMOSO",
    "ReferenceMuon",
    "ReferenceMuonHyperball",
    "ReferenceMuown",
    "ReferenceObliqueAdam",
    "ReferenceObliqueSGD",
    "ReferencePSGDPro",
    "ReferencePolarGrad",
    "ReferenceREKLS",
    "ReferenceRMSProp",
    "ReferenceSOAP",
    "ReferenceSOAPMuon",
    "ReferenceScion",
    "ReferenceShampoo",
    "ReferenceSignum",
    "ReferenceSimplifiedAdEMAMix",
    "ReferenceSpectron",
    "ReferenceSpel",
    "make_reference",
]
