"""Matrix-based optimizers for PyTorch: fast, numerically honest, one line to adopt.

Everything here is loaded on first use, so importing the package costs next to nothing over torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emerging_optimizers._version import __version__
from emerging_optimizers.registry import list_optimizers

if TYPE_CHECKING:
    from emerging_optimizers.cost import estimate
    from emerging_optimizers.orthogonalized_optimizers import (
        MOP,
        AdaptiveMuon,
        Muon,
        MuonHyperball,
        Muown,
        OrthogonalizedOptimizer,
        PolarGrad,
        Scion,
        Spectron,
        Spel,
    )
    from emerging_optimizers.psgd import PSGDPro
    from emerging_optimizers.riemannian_optimizers import Iso, ObliqueAdam, ObliqueSGD
    from emerging_optimizers.routing import RoutePlan, create_optimizer, plan_parameters
    from emerging_optimizers.scalar_optimizers import (
        AdamW,
        AdEMAMix,
        LaProp,
        Lion,
        MAdam,
        RMSProp,
        Signum,
        SimplifiedAdEMAMix,
    )
    from emerging_optimizers.shampoo import Shampoo
    from emerging_optimizers.soap import (
        MOSO,
        REKLS,
        SOAP,
        KlMSoap,
        KLShampoo,
        KlSoapV3,
        ReklsV3,
        SOAPMuon,
        StackedSoap,
        TpRekls,
    )
    from emerging_optimizers.watch import SpikeWatch

_HOMES = {
    "AdEMAMix": "scalar_optimizers",
    "AdamW": "scalar_optimizers",
    "AdaptiveMuon": "orthogonalized_optimizers",
    "Iso": "riemannian_optimizers",
    "KLShampoo": "soap",
    "KlMSoap": "soap",
    "KlSoapV3": "soap",
    "LaProp": "scalar_optimizers",
    "Lion": "scalar_optimizers",
    "MAdam": "scalar_optimizers",
    "MOP": "orthogonalized_optimizers",
    "MOSO": "soap",
    "Muon": "orthogonalized_optimizers",
    "MuonHyperball": "orthogonalized_optimizers",
    "Muown": "orthogonalized_optimizers",
    "ObliqueAdam": "riemannian_optimizers",
    "ObliqueSGD": "riemannian_optimizers",
    "OrthogonalizedOptimizer": "orthogonalized_optimizers",
    "PSGDPro": "psgd",
    "PolarGrad": "orthogonalized_optimizers",
    "REKLS": "soap",
    "RMSProp": "scalar_optimizers",
    "ReklsV3": "soap",
    "RoutePlan": "routing",
    "SOAP": "soap",
    "SOAPMuon": "soap",
    "Scion": "orthogonalized_optimizers",
    "Shampoo": "shampoo",
    "Signum": "scalar_optimizers",
    "SimplifiedAdEMAMix": "scalar_optimizers",
    "Spectron": "orthogonalized_optimizers",
    "Spel": "orthogonalized_optimizers",
    "SpikeWatch": "watch",
    "StackedSoap": "soap",
    "TpRekls": "soap",
    "create_optimizer": "routing",
    "estimate": "cost",
    "plan_parameters": "routing",
}

__all__ = [
    "MOP",
    "MOSO",
    "REKLS",
    "SOAP",
    "AdEMAMix",
    "AdamW",
    "AdaptiveMuon",
    "Iso",
    "KLShampoo",
    "KlMSoap",
    "KlSoapV3",
    "LaProp",
    "Lion",
    "MAdam",
    "Muon",
    "MuonHyperball",
    "Muown",
    "ObliqueAdam",
    "ObliqueSGD",
    "OrthogonalizedOptimizer",
    "PSGDPro",
    "PolarGrad",
    "RMSProp",
    "ReklsV3",
    "RoutePlan",
    "SOAPMuon",
    "Scion",
    "Shampoo",
    "Signum",
    "SimplifiedAdEMAMix",
    "Spectron",
    "Spel",
    "SpikeWatch",
    "StackedSoap",
    "TpRekls",
    "__version__",
    "create_optimizer",
    "estimate",
    "list_optimizers",
    "plan_parameters",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
