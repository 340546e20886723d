"""Matrix-based optimizers for PyTorch: fast, numerically honest, one line to adopt.

Everything here is loaded on first use, so importing the package costs next to nothing over torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emerging_optimizers._version import __version__ as __version__
from emerging_optimizers.registry import OPTIMIZERS
from emerging_optimizers.registry import list_optimizers as list_optimizers

# Type checkers read imports and run nothing, so the names that `_HOMES` finds are written down for them.
if TYPE_CHECKING:
    from emerging_optimizers.averaging import ScheduleFree as ScheduleFree
    from emerging_optimizers.averaging import WeightAverage as WeightAverage
    from emerging_optimizers.clipping import clip_gradients as clip_gradients
    from emerging_optimizers.converting import convert_state_dict as convert_state_dict
    from emerging_optimizers.cost import estimate as estimate
    from emerging_optimizers.orthogonalized_optimizers import OrthogonalizedOptimizer as OrthogonalizedOptimizer
    from emerging_optimizers.qk_clip import QKClip as QKClip
    from emerging_optimizers.routing import RoutePlan as RoutePlan
    from emerging_optimizers.routing import create_optimizer as create_optimizer
    from emerging_optimizers.routing import plan_parameters as plan_parameters
    from emerging_optimizers.watch import SpikeWatch as SpikeWatch

if TYPE_CHECKING:  # make tables
    from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon as AdaptiveMuon
    from emerging_optimizers.orthogonalized_optimizers.dion2 import Dion2 as Dion2
    from emerging_optimizers.orthogonalized_optimizers.dion3 import Dion3 as Dion3
    from emerging_optimizers.orthogonalized_optimizers.mop import MOP as MOP
    from emerging_optimizers.orthogonalized_optimizers.muon import Muon as Muon
    from emerging_optimizers.orthogonalized_optimizers.muon_hyperball import MuonHyperball as MuonHyperball
    from emerging_optimizers.orthogonalized_optimizers.muon_mix import MuonMix as MuonMix
    from emerging_optimizers.orthogonalized_optimizers.muown import Muown as Muown
    from emerging_optimizers.orthogonalized_optimizers.polargrad import PolarGrad as PolarGrad
    from emerging_optimizers.orthogonalized_optimizers.scion import Scion as Scion
    from emerging_optimizers.orthogonalized_optimizers.sinkhorn import Sinkhorn as Sinkhorn
    from emerging_optimizers.orthogonalized_optimizers.spectron import Spectron as Spectron
    from emerging_optimizers.orthogonalized_optimizers.spel import Spel as Spel
    from emerging_optimizers.psgd.psgd import PSGDPro as PSGDPro
    from emerging_optimizers.riemannian_optimizers.isospectral import Iso as Iso
    from emerging_optimizers.riemannian_optimizers.normalized_optimizer import ObliqueAdam as ObliqueAdam
    from emerging_optimizers.riemannian_optimizers.normalized_optimizer import ObliqueSGD as ObliqueSGD
    from emerging_optimizers.riemannian_optimizers.normalized_optimizer import (
        ObliqueSteepestAdam as ObliqueSteepestAdam,
    )
    from emerging_optimizers.riemannian_optimizers.normalized_optimizer import ObliqueSteepestSGD as ObliqueSteepestSGD
    from emerging_optimizers.scalar_optimizers.adamw import AdamW as AdamW
    from emerging_optimizers.scalar_optimizers.ademamix import AdEMAMix as AdEMAMix
    from emerging_optimizers.scalar_optimizers.laprop import LaProp as LaProp
    from emerging_optimizers.scalar_optimizers.lion import Lion as Lion
    from emerging_optimizers.scalar_optimizers.madam import MAdam as MAdam
    from emerging_optimizers.scalar_optimizers.mars import MARS as MARS
    from emerging_optimizers.scalar_optimizers.rmsprop import RMSProp as RMSProp
    from emerging_optimizers.scalar_optimizers.signum import Signum as Signum
    from emerging_optimizers.scalar_optimizers.sim_ademamix import SimplifiedAdEMAMix as SimplifiedAdEMAMix
    from emerging_optimizers.shampoo.shampoo import Shampoo as Shampoo
    from emerging_optimizers.soap.kl_shampoo import KLShampoo as KLShampoo
    from emerging_optimizers.soap.kl_soap import KlMSoap as KlMSoap
    from emerging_optimizers.soap.kl_soap import KlSoapV3 as KlSoapV3
    from emerging_optimizers.soap.kl_soap import ReklsV3 as ReklsV3
    from emerging_optimizers.soap.moso import MOSO as MOSO
    from emerging_optimizers.soap.rekls import REKLS as REKLS
    from emerging_optimizers.soap.soap import SOAP as SOAP
    from emerging_optimizers.soap.soap_muon import SOAPMuon as SOAPMuon
    from emerging_optimizers.soap.splus import SPlus as SPlus
    from emerging_optimizers.soap.stacked_soap import StackedSoap as StackedSoap
    from emerging_optimizers.soap.tp_rekls import TpRekls as TpRekls

_HOMES = {
    **{cls: module for module, cls in (entry.path.split(":") for entry in OPTIMIZERS.values())},
    "OrthogonalizedOptimizer": "emerging_optimizers.orthogonalized_optimizers",
    "QKClip": "emerging_optimizers.qk_clip",
    "RoutePlan": "emerging_optimizers.routing",
    "ScheduleFree": "emerging_optimizers.averaging",
    "SpikeWatch": "emerging_optimizers.watch",
    "WeightAverage": "emerging_optimizers.averaging",
    "clip_gradients": "emerging_optimizers.clipping",
    "convert_state_dict": "emerging_optimizers.converting",
    "create_optimizer": "emerging_optimizers.routing",
    "estimate": "emerging_optimizers.cost",
    "plan_parameters": "emerging_optimizers.routing",
}

_PUBLIC = sorted([*_HOMES, "__version__", "list_optimizers"])
if not TYPE_CHECKING:  # to type checkers a list that is computed exports nothing
    __all__ = _PUBLIC


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return _PUBLIC
