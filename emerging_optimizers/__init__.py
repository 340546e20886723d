"""Matrix-based optimizers for PyTorch: fast, numerically honest, one line to adopt.

Everything here is loaded on first use, so importing the package costs next to nothing over torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emerging_optimizers._version import __version__
from emerging_optimizers.registry import list_optimizers

if TYPE_CHECKING:
    from emerging_optimizers.orthogonalized_optimizers import Muon, OrthogonalizedOptimizer
    from emerging_optimizers.routing import RoutePlan, create_optimizer, plan_parameters
    from emerging_optimizers.scalar_optimizers import AdamW, LaProp, Lion
    from emerging_optimizers.soap import REKLS, SOAP

_HOMES = {
    "AdamW": "scalar_optimizers",
    "LaProp": "scalar_optimizers",
    "Lion": "scalar_optimizers",
    "Muon": "orthogonalized_optimizers",
    "OrthogonalizedOptimizer": "orthogonalized_optimizers",
    "REKLS": "soap",
    "RoutePlan": "routing",
    "SOAP": "soap",
    "create_optimizer": "routing",
    "plan_parameters": "routing",
}

__all__ = [
    "REKLS",
    "SOAP",
    "AdamW",
    "LaProp",
    "Lion",
    "Muon",
    "OrthogonalizedOptimizer",
    "RoutePlan",
    "__version__",
    "create_optimizer",
    "list_optimizers",
    "plan_parameters",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
